"""Colours of built-in scenes: from what the rays meet to a photograph."""

import functools

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from mtv_jax.data.scenes import textures
from mtv_jax.data.scenes.solids import Hits

_NOISE = 2.5  # standard deviation of the sensor's noise, of 255
_SHIFTS = 64  # places the noise can start from, along each axis


def table(rows: list) -> Float32[np.ndarray, "k 1 256"]:
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


_CROSS = np.ones((3, 3), np.uint8)


def owners(hits: Hits) -> UInt8[np.ndarray, "h w"]:
  """What each pixel shows: 0 backdrop, 1 ground, 2 + i for thing i."""
  numbers = np.zeros((1, 256), np.uint8)
  numbers[0, : len(hits.surfaces.owners)] = hits.surfaces.owners
  return cv2.LUT(hits.number, numbers)


def paint(
  hits: Hits, noise: tuple[float, float]
) -> UInt8[np.ndarray, "size size 3"]:
  """The photograph of a square grid of rays.

  Args:
    hits: what the rays meet.
    noise: two numbers in [0, 1) that place the sensor noise.
  """
  number = hits.number
  texels, left, top = (cv2.LUT(number, t) for t in table(hits.surfaces.tiles))
  hits_u = hits.u - np.floor(hits.u)
  hits_u *= texels
  hits_u += left
  hits_v = hits.v - np.floor(hits.v)
  hits_v *= texels
  hits_v += top
  # Texel i of a tile is centred at i + 0.5 of it.
  hits_u -= 0.5
  hits_v -= 0.5
  value = cv2.remap(
    textures.atlas().pixels, hits_u, hits_v, cv2.INTER_LINEAR
  ).astype(np.float32)
  tables = table(hits.surfaces.colours)
  tables[3:] *= 1 / 255
  planes = []
  for first, change in zip(tables[:3], tables[3:], strict=True):
    plane = cv2.LUT(number, change)
    plane *= value
    plane += cv2.LUT(number, first)
    plane *= hits.light
    planes.append(plane)
  size = number.shape[0]
  i, j = (int(n * _SHIFTS) for n in noise)
  image = cv2.add(
    cv2.merge(planes),
    _noise(size)[i : i + size, j : j + size],
    dtype=cv2.CV_8U,
  )
  return _soften(image, owners(hits))


def _soften(image, regions):
  """Mixes colours across the outlines of things.

  One ray a pixel leaves stairs along every outline; a blur of just these
  pixels hides them at a fraction of the cost of more rays.
  """
  edges = cv2.morphologyEx(regions, cv2.MORPH_GRADIENT, _CROSS)
  return cv2.copyTo(cv2.GaussianBlur(image, (3, 3), 0), edges, image)
