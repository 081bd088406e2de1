"""Texture patterns and silhouettes of built-in scenes."""

import numpy as np
import pytest

from mtv_jax.data.scenes import textures
from mtv_jax.data.scenes.world import SHAPES


def test_patterns_tile_without_a_seam():
  atlas = textures.build_atlas()
  n = textures.TILE
  for name, top in atlas.offset_y.items():
    left = atlas.offset_x[0]
    tile = atlas.pixels[top : top + n, left : left + n].astype(int)
    inner = np.abs(np.diff(tile, axis=0)).mean(1)
    seam = np.abs(tile[0] - tile[-1]).mean()
    assert seam <= inner.max() + 1, name
    inner = np.abs(np.diff(tile, axis=1)).mean(0)
    seam = np.abs(tile[:, 0] - tile[:, -1]).mean()
    assert seam <= inner.max() + 1, name


def test_silhouettes_fill_their_square():
  for name, distance in textures.build_silhouettes().items():
    rows, columns = np.nonzero(distance > 0)
    shape = SHAPES[name]
    n = textures.SILHOUETTE
    assert rows.max() == pytest.approx(0.98 * n, abs=2), name
    height = (n - rows.min()) / n
    assert height == pytest.approx(shape.top, abs=0.03), name
    half = (columns.max() - columns.min() + 1) / n / 2
    assert half == pytest.approx(shape.half, abs=0.03), name
