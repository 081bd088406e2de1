"""Segmentation metrics, and the base class of the evaluators.

Metrics are of a whole data set, from confusion matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64, UInt8

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import bootstrap, examples
from mtv_jax.evals.core.base import Evaluator, preprocess_protocol
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import IGNORE, Data, SegmentationSet
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.segmentation import sliding_window
from mtv_jax.utils import plots
from mtv_jax.utils.errors import InputError

AVERAGING = (
  "intersections and unions are summed over the whole set; mean over classes "
  "with a union, mean accuracy over classes with a true pixel"
)


Labels = Int[np.ndarray, "*n"] | UInt8[np.ndarray, "*n"]
Sums = Int64[np.ndarray, "3 k"] | Float[np.ndarray, "3 k"]


def confusion_matrix(
  truth: Labels, predicted: Labels, *, classes: int
) -> np.ndarray:
  """Pixel counts by (true class, predicted class), without `IGNORE`."""
  is_labelled = truth != IGNORE
  rows = truth[is_labelled].astype(np.int64)
  columns = predicted[is_labelled].astype(np.int64)
  for name, values in (("labels", rows), ("predictions", columns)):
    if values.size and not 0 <= values.min() <= values.max() < classes:
      raise InputError(
        f"{name} from {values.min()} to {values.max()}; expected 0 to "
        f"{classes - 1}, or {IGNORE} for a label to ignore"
      )
  # Integers: float bins lose counts beyond 2**24.
  counts = np.bincount(rows * classes + columns, minlength=classes**2)
  return counts.astype(np.int64).reshape(classes, classes)


def class_sums(counts: Int64[np.ndarray, "*n k k"]) -> np.ndarray:
  """Correct, true and predicted pixels of each class, `[*n, 3, k]`.

  Rows of `counts` are the truth. All metrics depend only on these sums.
  """
  hit = np.diagonal(counts, axis1=-2, axis2=-1)
  return np.stack([hit, counts.sum(axis=-1), counts.sum(axis=-2)], axis=-2)


def class_ious(sums: Sums) -> Float[np.ndarray, " k"]:
  """IoU per class; NaN if a class is in neither truth nor prediction."""
  hit, true, predicted = sums
  union = true + predicted - hit
  return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


def scores(sums: Sums) -> dict[str, float]:
  """`miou`, `macc` and `aacc` from the `class_sums` of a set.

  In `miou`, classes that are predicted but not in the truth have IoU 0; `macc`
  averages over classes in the truth; `aacc` is the fraction of correct pixels.
  """
  hit, true, _ = sums
  if not true.sum():
    raise InputError("every pixel is ignored")
  recall = hit[true > 0] / true[true > 0]
  return {
    "miou": float(np.nanmean(class_ious(sums))),
    "macc": float(recall.mean()),
    "aacc": float(hit.sum() / true.sum()),
  }


def estimate(sums: Int64[np.ndarray, "n 3 k"]) -> Estimate:
  """`scores` of n images, with standard errors over images."""
  flat = sums[sums[:, 1].any(axis=-1)].reshape(-1, 3 * sums.shape[-1])
  if not len(flat):
    raise InputError("every pixel is ignored")
  flat = flat.astype(np.float64)  # exact below 2**53
  return bootstrap.estimate(
    lambda weights: scores((weights @ flat).reshape(3, -1)), len(flat)
  )


def chance(sums: Int64[np.ndarray, "3 k"]) -> dict[str, float]:
  """Expected metrics of a uniform guess at every pixel.

  For a class with a fraction g of the pixels, among K classes, the intersection
  is g / K and the union g + 1 / K - g / K.
  """
  classes = sums.shape[1]
  share = sums[1] / sums[1].sum()
  iou = share / (1 + (classes - 1) * share)
  return {"miou": float(iou.mean()), "macc": 1 / classes, "aacc": 1 / classes}


_TEXT_SIZE = 16


@dataclasses.dataclass(frozen=True)
class SegmentationEvaluator(Evaluator):
  """Base class of the segmentation evaluators.

  None means the published value on real data and a small value on scenes.

  Attributes:
    size: side of windows and shorter side of images; defaults to the published
      size rounded up to whole patches, for scenes to the encoder's size.
    stride: pixels between windows; by default a fraction of `size`.
    encode_batch: windows per encoder batch.
  """

  data: Data = "scenes"
  size: PositiveInt | None = None
  stride: PositiveInt | None = None
  count: PositiveInt | None = None
  encode_batch: PositiveInt = 16
  pictures: NonNegativeInt = 0

  def _window_size(self, encoder: Encoder, published: int) -> int:
    """Window side; InputError if not a multiple of the patch size."""
    image = encoder.spec.image
    if self.size is None:
      on_scenes = is_scenes(self.data)
      default = encoder.preprocess.size if on_scenes else published
      return -(-default // image.patch_size) * image.patch_size
    image.grid_of(self.size, self.size)
    return self.size

  def _predict(
    self,
    score: sliding_window.Score,
    data: SegmentationSet,
    slide: sliding_window.Slide,
  ) -> Predictions:
    """Class sums of all heads for each image, and rows of the sheet."""
    indices = range(len(data.images))
    sheet_indices = self.pictures and examples.subsample(indices, self.pictures)
    names = data.classes or [str(i) for i in range(data.class_count)]

    def summarize(
      i: int, predicted: sliding_window.ClassMaps
    ) -> tuple[np.ndarray, list[np.ndarray]]:
      truth = data.maps[i]
      data.check_size(i, predicted[0].shape, truth)
      counts = [
        confusion_matrix(truth, p, classes=data.class_count) for p in predicted
      ]
      row = []
      if sheet_indices and i in sheet_indices:
        image = data.images[i]
        row = [_draw_row(image, (truth, p), names) for p in predicted]
      return class_sums(np.stack(counts)), row

    options = {"batch_size": self.encode_batch, "summarize": summarize}
    predictions = sliding_window.predict(data.images, score, slide, **options)
    sums, rows = zip(*predictions, strict=True)
    return Predictions(np.stack(sums), [row for row in rows if row])

  def _common_protocol(
    self,
    encoder: Encoder,
    data: SegmentationSet,
    slide: sliding_window.Slide,
  ) -> dict[str, Any]:
    return {
      **encoder.protocol(),
      **data.protocol(),
      "classes": data.class_count,
      "ignored": "label 255: no pixel of truth, prediction or union",
      "input_size": [slide.size, slide.size],
      "preprocess": preprocess_protocol(encoder, **slide.protocol()),
      "averaging": AVERAGING,
    }


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Class sums of several heads, and rows of their sheets."""

  sums: Int64[np.ndarray, "n heads 3 k"]  # per image, `class_sums`
  rows: list[list[np.ndarray]]  # per image of the sheet, one per head

  def sheets(self, name: str, *, head: int = 0) -> dict[str, np.ndarray]:
    """A head's sheet by name; empty without rows.

    Rows show image, truth and prediction above their class names.
    """
    rows = [row[head] for row in self.rows]
    titles = ("image", "truth", "prediction")
    return {name: plots.stack_rows(rows, titles)} if rows else {}


def _draw_row(
  image: np.ndarray, maps: Sequence[np.ndarray], names: Sequence[str]
) -> np.ndarray:
  """Image and maps above class names in their colours; ignored is white."""
  colours = np.full((256, 3), 255, np.uint8)
  colours[: len(names)] = plots.palette(len(names))
  strip = plots.image_with_maps(
    image, [colours[labels] for labels in maps], height=plots.THIRD
  )
  legend = [
    (names[i], tuple(map(int, colours[i])))
    for i in np.union1d(*maps)
    if i != examples.IGNORE
  ]
  text = plots.draw_lines(legend, strip.shape[1], size=_TEXT_SIZE)
  return np.concatenate([strip, text])
