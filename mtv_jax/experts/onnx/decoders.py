"""Decoders of ONNX detectors: preprocessing and outputs to boxes.

ONNX says what to compute, not what goes in and comes out. A `Decoder` does, and
is named by a string:

  fastestdet     FastestDet (Qiu 2022, github.com/dog-qiuqiu/FastestDet)
  MODULE:NAME    an object of yours with what `Decoder` has
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from mtv_jax.experts.labelling.detections import Detections
from mtv_jax.utils.errors import InputError, did_you_mean

_NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@runtime_checkable
class Decoder(Protocol):
  """How a kind of detector is asked and answers.

  Attributes:
    name: for a manifest: another name for every other answer.
    threshold: of scores, as its authors have it.
    nms: overlap of duplicates, as its authors have it.
  """

  name: str
  threshold: float
  nms: float

  def check(self, outputs: Mapping[str, Sequence[Any]], classes: int) -> None:
    """Raises ValueError for a file that is no such detector.

    Args:
      outputs: shapes by name, in order, the batch's dimension first; numbers,
        or names and None for what is not fixed.
      classes: how many have a name.
    """
    ...

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], height: int, width: int
  ) -> Float32[np.ndarray, "3 height width"]:
    """An RGB image as the file takes it."""
    ...

  def decode(
    self,
    outputs: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    threshold: float | int,
    image_size: tuple[int, int],
  ) -> Detections:
    """The boxes whose score is above a threshold, before suppression.

    Args:
      outputs: of one image, without the batch's dimension.
      names: of the classes.
      threshold: of scores.
      image_size: height and width of the image that was prepared.
    """
    ...


class FastestDet:
  """One box a cell of a grid, `[1, 5 + classes, h, w]`.

  With o, r, c the channels 0, 1 to 4 and the rest (o and c are in 0..1), in
  the cell of row i and column j:

      score = o^0.6 (max c)^0.4,  class = argmax c
      centre x = (j + tanh r_0) / w,  width = sigmoid r_2
      centre y = (i + tanh r_1) / h,  height = sigmoid r_3

  The image is squashed by area, in the order BGR, divided by 255. These are
  the rules of the example that its file comes with, which further rounds boxes
  to whole pixels before it compares them.
  """

  name = "fastestdet"
  threshold = 0.65
  nms = 0.45

  def check(self, outputs: Mapping[str, Sequence[Any]], classes: int) -> None:
    """Raises ValueError for other outputs than one `[n, 5 + classes, h, w]`."""
    shapes = list(outputs.values())
    if len(shapes) != 1 or len(shapes[0]) != 4:
      listed = ", ".join(f"{k}: {list(v)}" for k, v in outputs.items())
      raise InputError(
        "FastestDet has one output [n, 5 + classes, h, w]; this file has"
        f" {listed}. It is another detector: give decoder=MODULE:NAME of one"
        " that knows its outputs (see mtv_jax/experts/onnx/decoders.py)."
      )
    if isinstance(shapes[0][1], int):
      self._check_channels(shapes[0][1], classes)

  def _check_channels(self, channels: int, classes: int) -> None:
    if channels != 5 + classes:
      raise InputError(
        f"the output has {channels} channels, which is {channels - 5} classes"
        f" after FastestDet's 5 of objectness and box; there are {classes}"
        " names. Give those it was trained with, one a line, in their order."
      )

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], height: int, width: int
  ) -> Float32[np.ndarray, "3 height width"]:
    """Squashed, BGR, 0 to 1."""
    bgr = np.ascontiguousarray(image[..., ::-1])
    small = cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA)
    return (small.transpose(2, 0, 1) / 255).astype(np.float32)

  def decode(
    self,
    outputs: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    threshold: float | int,
    image_size: tuple[int, int],
  ) -> Detections:
    """The cells whose score is above the threshold."""
    del image_size  # Squashed: the unit square is the image's.
    (grid,) = outputs.values()
    self._check_channels(len(grid), len(names))
    classes = grid[5:]
    scores = grid[0] ** 0.6 * classes.max(axis=0) ** 0.4
    rows, columns = np.nonzero(scores > threshold)
    found = grid[:, rows, columns]
    places = np.stack([rows, columns]).astype(np.float32)
    sizes = np.array(scores.shape, np.float32)[:, None]
    centres = (places + np.tanh(found[[2, 1]])) / sizes
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is the 0 that it means.
      halves = 0.5 / (1 + np.exp(-found[[4, 3]]))
    return Detections(
      boxes=np.concatenate([centres - halves, centres + halves]).T,
      scores=scores[rows, columns],
      phrases=tuple(names[i] for i in found[5:].argmax(axis=0)),
    )


DECODERS: dict[str, Decoder] = {"fastestdet": FastestDet()}


def find(name: str) -> Decoder:
  """The decoder of a name; see the top of the file.

  Raises:
    InputError: for a name that is none, or of something else.
  """
  if name in DECODERS:
    return DECODERS[name]
  if not _NAMED.fullmatch(name):
    raise InputError(
      f"decoder={name!r}. {did_you_mean(name, DECODERS)} MODULE:NAME is one of"
      " your own."
    )
  module, _, attribute = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), attribute, None)
  except ModuleNotFoundError as error:
    raise InputError(
      f"decoder={name!r}: {error}. The module must be one that Python finds:"
      " set PYTHONPATH to its folder."
    ) from error
  if not isinstance(found, Decoder) or isinstance(found, type):
    raise InputError(
      f"decoder={name!r} is {found!r}; expected an object with what `Decoder`"
      " of mtv_jax/experts/onnx/decoders.py has"
    )
  return found
