"""Base of the depth evaluations: data, options, sheets."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from mtv_jax.evals.core.base import Evaluator
from mtv_jax.evals.core.examples import DepthSet
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.utils import plots
from mtv_jax.utils.errors import InputError, check_choice


class DepthEvaluator(Evaluator):
  """An evaluator with the options `data` and `truth`."""

  def check_choices(self, where: str, **choices: Iterable[str]) -> None:
    """Raises ConfigError for an option that is not None and no choice."""
    for name, allowed in choices.items():
      if (value := getattr(self, name)) is not None:
        check_choice(f"{where}: {name}", value, allowed)

  @functools.cached_property
  def _splits(self) -> dict[tuple[str, int], DepthSet]:
    return {}

  def open_split(self, split: str, size: int, **options) -> DepthSet:
    """Opens a split once.

    Args:
      split: its name.
      size: side of the images, for scenes.
      **options: of `registry.open_depth`.
    """
    key = split, size if is_scenes(self.data) else 0
    if key not in self._splits:
      self._splits[key] = registry.open_depth(
        self.data, split=split, size=key[1], truth=self.truth, **options
      )
    return self._splits[key]


def read_pair(data: DepthSet, i: int) -> tuple[np.ndarray, np.ndarray]:
  """Image `[h, w, 3]` and depth `[h, w]` of one example.

  Raises:
    InputError: if their sizes differ.
  """
  image, depth = data.images[i], data.depths[i]
  if image.shape[:2] != depth.shape:
    raise InputError(
      f"{data.name}: image {i} has {image.shape[:2]} pixels and its depth map "
      f"{depth.shape}; expected equal sizes"
    )
  return image, depth


def depth_row(
  image: Shaped[np.ndarray, "h w 3"],
  truth: Float[np.ndarray, "h w"],
  predicted: Float[np.ndarray, "h w"],
  valid: Bool[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Row of a sheet: image, true and predicted depth on the scale of the truth.

  Args:
    image: in 0..255.
    truth: metres.
    predicted: metres, positive.
    valid: pixels with a true depth; the others are black.
  """
  inverse = np.divide(1, truth, where=valid, out=np.zeros_like(truth))
  limits = (0.0, 1.0)
  if valid.any():
    limits = (float(inverse[valid].min()), float(inverse[valid].max()))
  maps = [
    plots.colour_depth(inverse, valid=valid, limits=limits),
    plots.colour_depth(1 / predicted, limits=limits),
  ]
  return plots.image_with_maps(image.astype(np.uint8), maps, height=160)
