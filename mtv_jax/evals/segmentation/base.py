"""Base class of the segmentation evaluations: windows, counts and sheets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image, ImageDraw

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core.base import Evaluator, preprocess_protocol
from mtv_jax.evals.core.examples import (
  IGNORE,
  Data,
  SegmentationSet,
  subsample,
)
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.segmentation import metrics as metrics_lib
from mtv_jax.evals.segmentation import sliding_window
from mtv_jax.utils import plots
from mtv_jax.utils.errors import InputError, did_you_mean

_TEXT_SIZE, _LINE_HEIGHT = 10, 14
_IMAGE_HEIGHT = 192


@dataclasses.dataclass(frozen=True)
class SegmentationEvaluator(Evaluator):
  """Base class of the segmentation evaluations.

  None means the published value on real data and a small one on scenes.

  Attributes:
    data: see `datasets/registry.py`.
    size: side of windows and shorter side of evaluated images: the published
      one, or the next that the patch divides; for scenes the encoder's own.
    stride: pixels between windows; by default a share of `size`.
    count: images to test on, evenly spaced; all by default.
    encode_batch: windows that are encoded at a time.
    pictures: images on the sheet.
  """

  data: Data = "scenes"
  size: int | None = None
  stride: int | None = None
  count: int | None = None
  encode_batch: int = 16
  pictures: int = 0

  def _check(self, name: str, **choices: Sequence[str | None]) -> None:
    """Raises ValueError unless each option has one of its choices."""
    for option, values in choices.items():
      if (value := getattr(self, option)) not in values:
        known = [v for v in values if v]
        raise InputError(
          f"{name}: {option}={value!r}. {did_you_mean(str(value), known)}"
        )

  def _window_size(self, encoder: Encoder, published: int) -> int:
    """Side of a window.

    Raises:
      InputError: for a size that the patch does not divide.
    """
    patch = encoder.spec.image.patch_size
    if self.size is None:
      scenes = is_scenes(self.data)
      default = encoder.preprocess.size if scenes else published
      return -(-default // patch) * patch
    if self.size % patch:
      near = max(1, round(self.size / patch)) * patch
      raise InputError(
        f"size={self.size} is not divisible by this encoder's patch of "
        f"{patch}; the nearest that is: {near}"
      )
    return self.size

  def _predict(
    self,
    encoder: Encoder,
    score: sliding_window.Score,
    data: SegmentationSet,
    slide: sliding_window.Slide,
  ) -> Predictions:
    """The confusion matrices of a whole set.

    Args:
      encoder: whose mean colour is the padding.
      score: from windows to the scores of every head.
      data: images and truth.
      slide: how images are cut into windows.
    """
    chosen = range(len(data.images))
    chosen = subsample(chosen, self.pictures) if self.pictures else ()
    total, examples = None, []
    predictions = sliding_window.predict(
      data.images,
      score,
      slide,
      fill=padding_colour(encoder),
      batch_size=self.encode_batch,
    )
    for i, predicted in enumerate(predictions):
      truth = data.maps[i]
      check_same_size(data, i, predicted[0], truth)
      counts = np.stack(
        [
          metrics_lib.confusion(truth, p, classes=data.class_count)
          for p in predicted
        ]
      )
      total = counts if total is None else total + counts
      if i in chosen:
        examples.append(Example(data.images[i], truth, predicted))
    return Predictions(data, total, examples)

  def _common_protocol(
    self,
    encoder: Encoder,
    data: SegmentationSet,
    slide: sliding_window.Slide,
  ) -> dict[str, Any]:
    return {
      **encoder.protocol(),
      "data": data.name,
      "data_hash": data.digest,
      "images": len(data.images),
      "classes": data.class_count,
      "ignored": "label 255: no pixel of truth, prediction or union",
      "input_size": [slide.size, slide.size],
      "preprocess": preprocess_protocol(encoder, **slide.protocol()),
      "averaging": metrics_lib.AVERAGING,
    }


def padding_colour(encoder: Encoder) -> Float32[np.ndarray, "3"]:
  """The colour that is zero after normalisation, in 0..255."""
  return np.float32(255) * np.asarray(encoder.preprocess.mean, np.float32)


def check_same_size(
  data: SegmentationSet, index: int, image: np.ndarray, labels: np.ndarray
) -> None:
  """Raises ValueError where an image and its map have different sizes."""
  if image.shape[:2] != labels.shape:
    raise InputError(
      f"{data.name}: image {index} is {list(image.shape[:2])} and its map "
      f"{list(labels.shape)}; expected the same size"
    )


@dataclasses.dataclass(frozen=True)
class Example:
  """An image of the sheet, its truth and the prediction of each head."""

  image: UInt8[np.ndarray, "h w 3"]
  truth: UInt8[np.ndarray, "h w"]
  predicted: list[UInt8[np.ndarray, "h w"]]


@dataclasses.dataclass(frozen=True)
class Predictions:
  """The predictions of some heads on a set.

  Attributes:
    data: the set.
    counts: each head's pixels by (true class, predicted class).
    examples: images for the sheet.
  """

  data: SegmentationSet
  counts: Int64[np.ndarray, "heads k k"]
  examples: list[Example]

  def sheets(
    self, name: str, *, head: int = 0
  ) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """The sheet of a head under `name`; nothing without examples.

    Rows of image, truth and prediction above the names of their classes.
    """
    if not self.examples:
      return {}
    count = self.data.class_count
    names = self.data.classes or [str(i) for i in range(count)]
    return {name: plots.vstack([_row(e, head, names) for e in self.examples])}


def paint(
  labels: UInt8[np.ndarray, "h w"], count: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Classes in the colours of `plots.palette`; ignored pixels in white."""
  colours = np.full((256, 3), 255, np.uint8)
  colours[:count] = plots.palette(count)
  colours[IGNORE] = 255
  return colours[labels]


def _row(
  example: Example, head: int, names: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
  maps = (example.truth, example.predicted[head])
  painted = [paint(labels, len(names)) for labels in maps]
  strip = plots.image_with_maps(example.image, painted, height=_IMAGE_HEIGHT)
  present = [int(i) for i in np.union1d(*maps) if i != IGNORE]
  return np.concatenate([strip, _legend(present, strip.shape[1], names)])


def _legend(
  present: Sequence[int], width: int, names: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
  """The names of some classes, each beside a square of its colour."""
  font, colours = plots.font(_TEXT_SIZE), plots.palette(len(names))
  corners, x, y = [], 0, 2
  for i in present:
    length = int(font.getlength(names[i])) + 20
    if x and x + length > width:
      x, y = 0, y + _LINE_HEIGHT
    corners.append((i, x, y))
    x += length
  page = Image.new("RGB", (width, y + _LINE_HEIGHT), plots.PAPER)
  draw = ImageDraw.Draw(page)
  for i, x, y in corners:
    colour = tuple(int(c) for c in colours[i])
    draw.rectangle((x, y + 2, x + 9, y + 11), fill=colour)
    draw.text((x + 12, y), names[i], plots.INK, font)
  return np.asarray(page)
