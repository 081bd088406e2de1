"""Image, true and predicted depth side by side, for people."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from mtv_jax.utils import plots

_GAP = 4
_HEIGHT = 160


def row(
  image: Shaped[np.ndarray, "h w 3"],
  truth: Float[np.ndarray, "h w"],
  predicted: Float[np.ndarray, "h w"],
  valid: Bool[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Image | truth | prediction, near in red, both maps on the truth's scale.

  Args:
    image: in 0..255.
    truth: metres.
    predicted: metres, positive.
    valid: where the truth is known; elsewhere it is black.
  """
  low, high = (
    float(f(1 / truth[valid])) if valid.any() else 1.0 for f in (np.min, np.max)
  )
  inverse = np.where(valid, 1 / np.where(valid, truth, 1), low)
  both = np.concatenate([inverse, np.clip(1 / predicted, low, high)], axis=1)
  picture = plots.depth_picture(both.astype(np.float32)).copy()
  width = truth.shape[1]
  picture[:, :width][~valid] = 0
  panels = [image.astype(np.uint8), picture[:, :width], picture[:, width:]]
  scaled = (_HEIGHT * width // truth.shape[0], _HEIGHT)
  # Nearest: the points of a sparse map would vanish in a mean.
  panels = [
    cv2.resize(np.ascontiguousarray(p), scaled, interpolation=method)
    for p, method in zip(
      panels,
      (cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_NEAREST),
      strict=True,
    )
  ]
  gap = np.full((_HEIGHT, _GAP, 3), 255, np.uint8)
  return np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)


def sheet(
  rows: Sequence[UInt8[np.ndarray, "h _ 3"]],
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Rows one below the other, white where one is shorter."""
  width = max(r.shape[1] for r in rows)
  padded = [
    np.pad(
      r,
      ((0, _GAP), (0, width - r.shape[1]), (0, 0)),
      constant_values=255,
    )
    for r in rows
  ]
  return np.concatenate(padded)[:-_GAP]
