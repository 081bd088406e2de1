"""Colours of built-in scenes: from ray hits to an sRGB image."""

import functools

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from mtv_jax.data.scenes import textures
from mtv_jax.data.scenes.raycast import Hits

_NOISE = 2.5  # standard deviation of the sensor's noise, of 255
_SHIFTS = 64  # offsets of the noise along each axis
_CROSS = np.ones((3, 3), np.uint8)


def _tables(rows: list) -> Float32[np.ndarray, "k 1 256"]:
  """Columns of a list of rows as look-up tables for `cv2.LUT`."""
  columns = np.array(rows, np.float32).T
  tables = np.zeros((len(columns), 1, 256), np.float32)
  tables[:, 0, : columns.shape[1]] = columns
  return tables


@functools.lru_cache(maxsize=8)
def _noise(size: int) -> Float32[np.ndarray, "n n 3"]:
  side = size + _SHIFTS
  noise = np.random.default_rng(7).standard_normal((side, side, 3), np.float32)
  return _NOISE * noise


def owners(hits: Hits) -> UInt8[np.ndarray, "h w"]:
  """What each pixel shows: 0 backdrop, 1 ground, 2 + i for object i."""
  numbers = np.zeros((1, 256), np.uint8)
  numbers[0, : len(hits.surfaces.owners)] = hits.surfaces.owners
  return cv2.LUT(hits.number, numbers)


def shade(
  hits: Hits, noise: tuple[float, float]
) -> UInt8[np.ndarray, "size size 3"]:
  """The image of a square grid of rays.

  Args:
    hits: of the rays.
    noise: two numbers in [0, 1), the offset of the sensor noise.
  """
  number = hits.number
  texels, left, top = (cv2.LUT(number, t) for t in _tables(hits.surfaces.tiles))
  x, y = hits.u - np.floor(hits.u), hits.v - np.floor(hits.v)
  for value, start in ((x, left), (y, top)):
    value *= texels
    value += start
    value -= 0.5  # texel i of a tile is centred at i + 0.5 of it
  mix = cv2.remap(textures.atlas().pixels, x, y, cv2.INTER_LINEAR)
  mix = mix.astype(np.float32)
  tables = _tables(hits.surfaces.colours)
  tables[3:] *= 1 / 255
  planes = []
  for first, change in zip(tables[:3], tables[3:], strict=True):
    plane = cv2.LUT(number, change)
    plane *= mix
    plane += cv2.LUT(number, first)
    plane *= hits.light
    planes.append(plane)
  size = number.shape[0]
  i, j = (int(n * _SHIFTS) for n in noise)
  noise = _noise(size)[i : i + size, j : j + size]
  image = cv2.add(cv2.merge(planes), noise, dtype=cv2.CV_8U)
  # One ray a pixel leaves stairs along every outline; a blur of just these
  # pixels hides them at a fraction of the cost of more rays.
  edges = cv2.morphologyEx(owners(hits), cv2.MORPH_GRADIENT, _CROSS)
  return cv2.copyTo(cv2.GaussianBlur(image, (3, 3), 0), edges, image)
