"""Base class of the segmentation evaluators: windows, counts and sheets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image, ImageDraw

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import Evaluator, preprocess_protocol
from mtv_jax.evals.core.examples import Data, SegmentationSet
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.segmentation import metrics as metrics_lib
from mtv_jax.evals.segmentation import sliding_window
from mtv_jax.utils import plots

_TEXT_SIZE, _LINE_HEIGHT = 16, 20


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
        metrics_lib.confusion_matrix(truth, p, classes=data.class_count)
        for p in predicted
      ]
      row = []
      if sheet_indices and i in sheet_indices:
        image = data.images[i]
        row = [_draw_row(image, (truth, p), names) for p in predicted]
      return metrics_lib.class_sums(np.stack(counts)), row

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
      "averaging": metrics_lib.AVERAGING,
    }


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Class sums of several heads, and rows of their sheets."""

  sums: Int64[np.ndarray, "n heads 3 k"]  # per image, `metrics.class_sums`
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
  """Image and maps in `plots.palette` colours; ignored pixels are white."""
  colours = np.full((256, 3), 255, np.uint8)
  colours[: len(names)] = plots.palette(len(names))
  strip = plots.image_with_maps(
    image, [colours[labels] for labels in maps], height=plots.THIRD
  )
  class_ids = [int(i) for i in np.union1d(*maps) if i != examples.IGNORE]
  return np.concatenate([strip, _draw_legend(class_ids, strip.shape[1], names)])


def _draw_legend(
  class_ids: Sequence[int], width: int, names: Sequence[str]
) -> np.ndarray:
  """Legend of class names and colours."""
  font, colours = plots.font(_TEXT_SIZE), plots.palette(len(names))
  corners, x, y = [], 0, 2
  for i in class_ids:
    length = int(font.getlength(names[i])) + 26
    if x and x + length > width:
      x, y = 0, y + _LINE_HEIGHT
    corners.append((i, x, y))
    x += length
  legend = Image.new("RGB", (width, y + _LINE_HEIGHT), plots.PAPER)
  draw = ImageDraw.Draw(legend)
  for i, x, y in corners:
    colour = tuple(int(c) for c in colours[i])
    draw.rectangle((x, y + 4, x + 12, y + 16), fill=colour)
    draw.text((x + 16, y), names[i], plots.INK, font)
  return np.asarray(legend)
