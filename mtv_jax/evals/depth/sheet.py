"""Sheets of depth maps: image, true depth, predicted depth."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from mtv_jax.utils import plots


def depth_row(
  image: Shaped[np.ndarray, "h w 3"],
  truth: Float[np.ndarray, "h w"],
  predicted: Float[np.ndarray, "h w"],
  valid: Bool[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Image, true and predicted depth in the colours of the true one's range.

  Args:
    image: in 0..255.
    truth: metres.
    predicted: metres, positive.
    valid: pixels with a true depth; the others are black.
  """
  inverse = np.divide(1, truth, where=valid, out=np.zeros_like(truth))
  known = inverse[valid]
  limits = (0.0, 1.0)
  if known.size:
    limits = (float(known.min()), float(known.max()))
  maps = [
    plots.colour_depth(inverse, valid=valid, limits=limits),
    plots.colour_depth(1 / predicted, limits=limits),
  ]
  return plots.image_with_maps(image.astype(np.uint8), maps, height=160)
