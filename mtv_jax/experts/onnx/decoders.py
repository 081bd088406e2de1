"""Decoders of ONNX detectors: preprocessing, and boxes from outputs.

An ONNX file does not define the meaning of its outputs; a `Decoder` does:

  fastestdet     FastestDet (Qiu 2022, github.com/dog-qiuqiu/FastestDet)
  MODULE:NAME    an object with the members of `Decoder`
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from mtv_jax.experts.labelling.detections import Detections
from mtv_jax.utils.errors import InputError, did_you_mean

_MODULE_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@runtime_checkable
class Decoder(Protocol):
  """Preprocessing and output format of a kind of detector."""

  name: str  # For the manifest; changes when results change.
  threshold: float  # Minimum score, the authors' default.
  nms: float  # IoU of duplicates, the authors' default.

  def check(self, outputs: Mapping[str, Sequence[Any]], classes: int) -> None:
    """Raises ValueError if the model is not this kind of detector.

    Args:
      outputs: shapes by name, in order, with batch dimension; symbolic sizes
        are names or None.
      classes: number of class names.
    """
    ...

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], height: int, width: int
  ) -> Float32[np.ndarray, "3 height width"]:
    """Converts an RGB image to the model's input."""
    ...

  def decode(
    self,
    outputs: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    threshold: float | int,
    image_size: tuple[int, int],
  ) -> Detections:
    """Returns boxes with scores above a threshold, before suppression.

    `outputs` belong to one image, without batch dimension; `names` are class
    names; `image_size` is (height, width) before `prepare`.
    """
    ...


class FastestDet:
  """FastestDet decoder: one box per cell of a grid `[1, 5 + classes, h, w]`.

  For the cell of row i and column j, with channels o (0), r (1 to 4) and c (the
  rest), where o and c are in [0, 1]:

      score = o^0.6 (max c)^0.4,  class = argmax c
      centre x = (j + tanh r_0) / w,  width = sigmoid r_2
      centre y = (i + tanh r_1) / h,  height = sigmoid r_3

  Images are squashed with area interpolation, in BGR order, divided by 255.
  Unlike the published example, does not round boxes to pixels.
  """

  name = "fastestdet"
  threshold = 0.65
  nms = 0.45

  def check(self, outputs: Mapping[str, Sequence[Any]], classes: int) -> None:
    """Raises InputError unless the output is one `[n, 5 + classes, h, w]`."""
    shapes = list(outputs.values())
    if len(shapes) != 1 or len(shapes[0]) != 4:
      listed = ", ".join(f"{k}: {list(v)}" for k, v in outputs.items())
      raise InputError(
        "FastestDet has one output [n, 5 + classes, h, w]; the file has"
        f" {listed}. Give decoder=MODULE:NAME for another detector (see"
        " mtv_jax/experts/onnx/decoders.py)."
      )
    channels = shapes[0][1]
    if classes < 1:
      raise InputError("there is no class name; give one per line.")
    if isinstance(channels, int) and channels != 5 + classes:
      raise InputError(
        f"the output has {channels} channels: {channels - 5} classes after 5 of"
        f" objectness and box, and there are {classes} names. Give those of its"
        " training, one per line, in their order."
      )

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], height: int, width: int
  ) -> Float32[np.ndarray, "3 height width"]:
    """Squashes an image; BGR, 0 to 1."""
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
    """Returns the boxes of cells with scores above the threshold."""
    del image_size  # Squashed images share the unit square.
    (grid,) = outputs.values()
    self.check({"output": (1, *grid.shape)}, len(names))
    classes = grid[5:]
    scores = grid[0] ** 0.6 * classes.max(axis=0) ** 0.4
    rows, columns = np.nonzero(scores > threshold)
    cells = grid[:, rows, columns]
    corners = np.stack([rows, columns]).astype(np.float32)
    sizes = np.array(scores.shape, np.float32)[:, None]
    centres = (corners + np.tanh(cells[[2, 1]])) / sizes
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is the sigmoid's 0.
      halves = 0.5 / (1 + np.exp(-cells[[4, 3]]))
    return Detections(
      boxes=np.concatenate([centres - halves, centres + halves]).T,
      scores=scores[rows, columns],
      phrases=tuple(names[i] for i in cells[5:].argmax(axis=0)),
    )


DECODERS: dict[str, Decoder] = {"fastestdet": FastestDet()}


def get_decoder(name: str) -> Decoder:
  """Returns a decoder by name, see the top of the file."""
  if name in DECODERS:
    return DECODERS[name]
  if not _MODULE_NAME.fullmatch(name):
    raise InputError(
      f"decoder={name!r}. {did_you_mean(name, DECODERS)} MODULE:NAME imports "
      "one."
    )
  module, _, attribute = name.partition(":")
  try:
    decoder = getattr(importlib.import_module(module), attribute, None)
  except ModuleNotFoundError as error:
    raise InputError(
      f"decoder={name!r}: {error}. Set PYTHONPATH to the module's folder."
    ) from error
  if not isinstance(decoder, Decoder) or isinstance(decoder, type):
    raise InputError(
      f"decoder={name!r} is {decoder!r}; expected an object with the members of"
      " `Decoder` of mtv_jax/experts/onnx/decoders.py."
    )
  return decoder
