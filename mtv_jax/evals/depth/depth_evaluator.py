"""Base class of the depth evaluators: data, per-image scores, sheets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.examples import Data, DenseSet
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.depth import metrics
from mtv_jax.utils import plots

# Image in 0..255, true depth in metres (0: unknown), predicted map.
Prediction = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DepthEvaluator(Evaluator):
  """Base class of the depth evaluators.

  Attributes:
    truth: `raw` or `filled` depth, for NYUv2 layouts with both.
  """

  data: Data = "scenes"
  count: PositiveInt | None = None
  truth: str | None = None
  pictures: NonNegativeInt = 0  # Test images on the sheet.

  # Units of metrics where lower is better, and the kind of map that
  # `registry.open_{_kind}` opens.
  _units: ClassVar[dict[str, str]] = metrics.UNITS
  _kind: ClassVar[str] = "depth"

  def _valid_mask(self, truth: np.ndarray, **limits: Any) -> np.ndarray:
    """Mask of the valid pixels of a true map."""
    return metrics.valid_mask(truth, **limits)

  def _draw_row(self, image, truth, predicted, valid) -> np.ndarray:
    """Row of the sheet: image, true and predicted map, both of inverse depth.

    Colours span the truth's range; invalid pixels of the truth are black.
    """
    inverse = np.divide(1, truth, where=valid, out=np.zeros_like(truth))
    limits = float(inverse[valid].min()), float(inverse[valid].max())
    maps = [
      plots.colour_depth(inverse, valid=valid, limits=limits),
      plots.colour_depth(1 / predicted, limits=limits),
    ]
    return plots.image_with_maps(
      image.astype(np.uint8), maps, height=plots.THIRD
    )

  @functools.cached_property
  def _splits(self) -> dict[tuple[str, int], DenseSet]:
    return {}

  def open_split(self, split: str, size: int, **options) -> DenseSet:
    """Opens a split, cached; `size` applies to scenes, see `open_depth`."""
    key = split, size if is_scenes(self.data) else 0
    if key not in self._splits:
      open_data = getattr(registry, f"open_{self._kind}")
      self._splits[key] = open_data(
        self.data, split=split, size=key[1], truth=self.truth, **options
      )
    return self._splits[key]

  def _opened(self) -> list[Any]:
    # Scenes are rendered at the encoder's size, once an encoder runs.
    return [] if is_scenes(self.data) else [*self._splits.values()]

  def _score_images(
    self,
    predictions: Iterable[Prediction],
    score: Callable[[np.ndarray | None, np.ndarray], dict[str, float]],
    protocol: dict[str, Any],
    *,
    to_metres: Callable[..., np.ndarray] = lambda predicted, *_: predicted,
    min_pixels: int = 1,
    **limits: Any,
  ) -> Result:
    """Returns means over images, chance, and the sheet.

    `score` computes metrics from predicted (None: the best constant) and true
    values of the pixels that are valid within `limits` (`metrics.valid_mask`);
    images with fewer than `min_pixels` are skipped. `to_metres` computes the
    sheet's depth from predicted map, true map and valid mask.
    """
    scores, chance, rows, skipped = [], [], [], 0
    for image, truth, predicted in predictions:
      valid = self._valid_mask(truth, **limits)
      if valid.sum() < min_pixels:
        skipped += 1
        continue
      scores.append(score(predicted[valid], truth[valid]))
      chance.append(score(None, truth[valid]))
      if len(rows) < self.pictures:
        depth = to_metres(predicted, truth, valid)
        rows.append(self._draw_row(image, truth, depth, valid))
    means = metrics.average(scores, skipped=skipped)
    units = {k: u for k, u in self._units.items() if k in means.metrics}
    titles = ("image", f"true {self._kind}", f"predicted {self._kind}")
    return Result.from_estimate(
      means,
      protocol | {"images": len(scores), "images_skipped": skipped},
      metrics.average(chance).metrics,
      units=units,
      lower=tuple(units),
      sheets={self._kind: plots.stack_rows(rows, titles)} if rows else {},
    )
