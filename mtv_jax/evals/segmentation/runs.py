"""Running heads over the images of a set, and counting what is right."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.examples import SegmentationSet
from mtv_jax.evals.segmentation import metrics as segmentation_metrics
from mtv_jax.evals.segmentation import sheets as segmentation_pictures
from mtv_jax.evals.segmentation import sliding


@dataclasses.dataclass(frozen=True)
class Shown:
  """An image for the sheet, and what each head predicted of it."""

  image: UInt8[np.ndarray, "h w 3"]
  truth: UInt8[np.ndarray, "h w"]
  predicted: list[UInt8[np.ndarray, "h w"]]


@dataclasses.dataclass(frozen=True)
class Found:
  """What heads found in a set.

  Attributes:
    counts: each head's pixels by (true class, predicted class).
    shown: some of the images.
  """

  counts: list[Int64[np.ndarray, "k k"]]
  shown: list[Shown]

  def pictures(
    self, name: str, data: SegmentationSet, *, head: int = 0
  ) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """The sheet of a head under its name, if images were to be shown."""
    if not self.shown:
      return {}
    rows = [
      segmentation_pictures.Example(s.image, s.truth, s.predicted[head])
      for s in self.shown
    ]
    sheet = segmentation_pictures.sheet(
      rows, count=data.class_count, names=data.classes
    )
    return {name: sheet}


def evaluate(
  score: sliding.Score,
  data: SegmentationSet,
  slide: sliding.Slide,
  *,
  fill: Float32[np.ndarray, "3"],
  batch_size: int,
  pictures: int = 0,
) -> Found:
  """Counts over a whole set.

  Args:
    score: from windows to the scores of every head.
    data: images and truth.
    slide: how images are seen.
    fill: colour of the padding.
    batch_size: windows scored at a time.
    pictures: images to show, evenly spaced.
  """
  images = data.images
  chosen = examples.subsample(range(len(images)), pictures) if pictures else ()
  total: list[np.ndarray] = []
  shown = []
  predictions = sliding.predict(
    images, score, slide, fill=fill, batch_size=batch_size
  )
  for i, predicted in enumerate(predictions):
    truth = data.maps[i]
    if truth.shape != predicted[0].shape:
      raise ValueError(
        f"{data.name}: image {i} is {list(predicted[0].shape)} and its map "
        f"{list(truth.shape)}; expected the same size"
      )
    counts = [
      segmentation_metrics.confusion(truth, p, classes=data.class_count)
      for p in predicted
    ]
    if total:
      counts = [a + b for a, b in zip(total, counts, strict=True)]
    total = counts
    if i in chosen:
      shown.append(Shown(images[i], truth, predicted))
  return Found(total, shown)


def window_size(encoder: Encoder, size: int | None, *, default: int) -> int:
  """Side of a window: `size`, or the default rounded up to whole patches.

  Raises:
    ValueError: for a size that the patch does not divide.
  """
  patch = encoder.spec.image.patch_size
  if size is None:
    return -(-default // patch) * patch
  if size % patch:
    near = max(1, round(size / patch)) * patch
    raise ValueError(
      f"size={size} is not divisible by this encoder's patch of {patch}; the "
      f"nearest that is: {near}"
    )
  return size


def fill_of(encoder: Encoder) -> Float32[np.ndarray, "3"]:
  """The colour that is zero once it is normalised."""
  return np.float32(255) * np.asarray(encoder.preprocess.mean, np.float32)


def protocol(
  encoder: Encoder, data: SegmentationSet, slide: sliding.Slide
) -> dict[str, Any]:
  """What every segmentation's figures depend on, for JSON."""
  return {
    **encoder.protocol(),
    "data": data.name,
    "data_hash": data.digest,
    "images": len(data.images),
    "classes": data.class_count,
    "ignored": "label 255: no pixel of truth, prediction or union",
    "input_size": [slide.size, slide.size],
    "preprocess": {
      "mean": list(encoder.preprocess.mean),
      "std": list(encoder.preprocess.std),
      **slide.protocol(),
    },
    "averaging": segmentation_metrics.AVERAGING,
  }
