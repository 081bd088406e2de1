"""Texture atlas and silhouettes of built-in scenes.

Tileable two-tone patterns, packed with their mipmaps into one atlas, and signed
distance maps of the flat silhouettes, both from fixed seeds. A pattern has one
channel that mixes a surface's first colour (0) and second colour (1), so one
`cv2.remap` call per frame samples every surface.
"""

import dataclasses
import functools

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

TILE = 256  # Texels per side of a pattern at level 0.
LEVELS = 6  # 256, 128, 64, 32, 16 and 8 texels.
SILHOUETTE = 128  # Samples per side of a silhouette.


@dataclasses.dataclass(frozen=True)
class Atlas:
  """All patterns at all levels, in one image.

  At level l, a pattern's tile starts at column `offset_x[l]` and row
  `offset_y[name]` and has `TILE >> l` texels per side. A wrapped border of one
  texel makes bilinear sampling seamless.
  """

  pixels: UInt8[np.ndarray, "height width"]
  offset_x: tuple[int, ...]
  offset_y: dict[str, int]


def _noise(
  rng: np.random.Generator, low: int, high: int, stretch: float = 1.0
) -> Float[np.ndarray, "t t"]:
  """Normalised tileable noise between two frequencies (cycles per tile).

  `stretch` > 1 elongates blobs along the first axis.
  """
  fy = np.fft.fftfreq(TILE, 1 / TILE)[:, None] * stretch
  fx = np.fft.fftfreq(TILE, 1 / TILE)[None, :]
  frequency = np.hypot(fy, fx)
  band = (frequency >= low) & (frequency <= high)
  amplitude = np.where(band, 1 / np.maximum(frequency, 1), 0)
  phases = np.fft.fft2(rng.standard_normal((TILE, TILE)))
  noise = np.fft.ifft2(phases * amplitude).real
  return (noise - noise.mean()) / noise.std()


def _ramp(distance: np.ndarray, width: float) -> np.ndarray:
  """A soft step: 1 well inside (distance > 0), 0 outside."""
  return np.clip(distance / width + 0.5, 0, 1)


def _triangle(x: np.ndarray) -> np.ndarray:
  """Distance to the nearest integer, in [0, 0.5]."""
  return np.abs(x - np.round(x))


def _cells(rng: np.random.Generator, points: int) -> np.ndarray:
  """Distances to the nearest and second nearest random point, wrapped."""
  pixels = np.indices((TILE, TILE)) / TILE
  distances = []
  for point in rng.random((points, 2)):
    offset = np.abs(pixels - point[:, None, None])
    distances.append(np.hypot(*np.minimum(offset, 1 - offset)))
  return np.partition(distances, 1, axis=0)[:2]


def _make_patterns() -> dict[str, np.ndarray]:
  """All patterns, float [TILE, TILE] in about [0, 1]."""
  rng = np.random.default_rng(20240229)
  axis = (np.arange(TILE) + 0.5) / TILE
  y, x = np.meshgrid(axis, axis, indexing="ij")
  soft = 0.03
  fine = _noise(rng, 12, 90)
  cloud = _noise(rng, 2, 40)
  broad = _noise(rng, 1, 6)
  near, second = _cells(rng, 90)
  row = np.floor(y * 6)
  brick_x = x * 3 + 0.5 * (row % 2)
  joint = np.minimum(_triangle(brick_x) / 3, _triangle(y * 6) / 6)
  tone = np.sin(12.9 * np.floor(brick_x % 3) + 7.1 * row)
  rings = y * 5 + 0.35 * _noise(rng, 1, 5, 3.0)
  grain = _noise(rng, 4, 100, 14.0).T
  weave = (np.floor(x * 6) + np.floor(y * 6)) % 2
  ribs = np.where(weave > 0, np.sin(x * 6 * np.pi), np.sin(y * 6 * np.pi)) ** 2
  dot_y = y * 4
  dot_x = x * 4 + 0.5 * (np.floor(dot_y) % 2)
  dots = np.hypot(dot_y % 1 - 0.5, dot_x % 1 - 0.5)
  swirl = _noise(rng, 1, 24, 1.5)
  veins = np.abs(np.sin(np.pi * (x + y + 0.45 * swirl)))
  plank = _triangle(y * 4) / 4
  shade = 0.12 * np.sin(5.3 * np.floor(y * 4 + 0.5) % 4 * 2)
  checks = np.sin(x * 6 * np.pi) * np.sin(y * 6 * np.pi)
  zigzag = _triangle(y * 4 + _triangle(x * 4))
  ripples = np.sin(2 * np.pi * (y * 7 + 0.25 * broad))
  tile = np.minimum(_triangle(x * 2), _triangle(y * 2)) / 2
  stones = 0.95 - _ramp(second - near - 0.012, 0.02)
  loops = 0.25 * np.sin(x * 16 * np.pi) * np.sin(y * 16 * np.pi)
  seam = _ramp(0.012 - _triangle(x * 4) / 4, 0.012)
  return {
    # For objects.
    "plain": 0.3 + 0.1 * cloud + 0.05 * fine,
    "striped": _ramp(_triangle(x * 4) - 0.29, soft) + 0.03 * fine,
    "dotted": _ramp(0.3 - dots, 2 * soft) + 0.03 * fine,
    "checkered": _ramp(checks, 0.3) + 0.03 * fine,
    "zigzag": _ramp(zigzag - 0.28, 2 * soft) + 0.03 * fine,
    "wooden": 0.3 + 0.34 * np.sin(2 * np.pi * rings) + 0.14 * grain,
    "brick": _ramp(0.014 - joint, 0.01) + 0.12 * tone + 0.05 * fine,
    "marble": np.exp(-((veins / 0.25) ** 2)) + 0.12 * cloud,
    "woven": 0.85 - 0.9 * ribs + 0.04 * fine,
    "speckled": _ramp(_noise(rng, 14, 40) - 0.75, 0.4) + 0.04 * fine,
    # For grounds and backdrops.
    "grass": 0.5 + 0.22 * _noise(rng, 10, 110, 0.35) + 0.12 * cloud,
    "sand": 0.5 + 0.2 * fine + 0.15 * ripples,
    "planks": _ramp(0.008 - plank, 0.008) + 0.4 + shade + 0.16 * grain,
    "tiles": _ramp(0.016 - tile, 0.01) + 0.08 * cloud,
    "gravel": stones + 6 * near + 0.05 * fine,
    "carpet": 0.4 + loops + 0.15 * cloud,
    "snow": 0.35 + 0.2 * broad + 0.08 * fine,
    "plaster": 0.4 + 0.14 * cloud + 0.07 * fine,
    "clouds": _ramp(broad + 0.15 * cloud - 0.4, 2.2),
    "leaves": np.clip(5.5 * near, 0, 1) * 0.8 + 0.12 * cloud,
    "panels": seam + 0.35 + 0.16 * grain.T,
  }


@functools.cache
def build_atlas() -> Atlas:
  """Packs the patterns; the first call takes about 0.3 s."""
  sizes = [TILE >> level for level in range(LEVELS)]
  patterns = _make_patterns()
  offset_x = tuple(int(sum(sizes[:i]) + 2 * i + 1) for i in range(LEVELS))
  offset_y = {name: i * (TILE + 2) + 1 for i, name in enumerate(patterns)}
  pixels = np.zeros((len(patterns) * (TILE + 2), sum(sizes) + 2 * LEVELS), "u1")
  for name, pattern in patterns.items():
    top = offset_y[name]
    intensity = np.clip(pattern, 0, 1).astype(np.float32)
    for left, size in zip(offset_x, sizes, strict=True):
      tile = cv2.resize(intensity, (size, size), interpolation=cv2.INTER_AREA)
      tile = np.pad(np.round(255 * tile).astype(np.uint8), 1, mode="wrap")
      pixels[top - 1 : top + size + 1, left - 1 : left + size + 1] = tile
  return Atlas(pixels, offset_x, offset_y)


def _stack_points(x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "n 2"]:
  return np.stack([x, y], -1)


def _make_curve(radius: float, ripple: float = 0.0) -> Float[np.ndarray, "n 2"]:
  """Closed curve radius + ripple * cos(6 angle), angle 0 up, as (x, y)."""
  angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
  r = radius + ripple * np.cos(6 * angle)
  return _stack_points(r * np.sin(angle), r * np.cos(angle))


def _make_outlines() -> dict[str, list[Float[np.ndarray, "n 2"]]]:
  """Outlines by silhouette: polygons of (x, y), y up; even-odd fill rule."""
  angle = np.linspace(0, 2 * np.pi, 11)[:-1]
  radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
  t = np.linspace(0, 2 * np.pi, 400, endpoint=False)
  heart = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
  outer = np.linspace(0.2 * np.pi, 1.8 * np.pi, 200)
  inner = np.linspace(1.735 * np.pi, 0.265 * np.pi, 200)
  crescent = (
    _stack_points(np.cos(outer), np.sin(outer)),
    _stack_points(0.38 + 0.64 * np.cos(inner), 0.8 * np.sin(inner)),
  )
  a, b = 0.3, 1.0
  cross = [(-a, b), (a, b), (a, a), (b, a), (b, -a), (a, -a)]
  cross += [(-x, -y) for x, y in cross]
  arrow = [(0, 1), (0.7, 0.15), (0.27, 0.15), (0.27, -1)]
  arrow += [(-x, y) for x, y in reversed(arrow[1:])]
  body = _stack_points(0.28 + 0.72 * np.cos(t), 0.5 * np.sin(t))
  tail = [(-0.95, 0.48), (-0.95, -0.48), (-0.3, 0.0)]
  return {
    "star": [_stack_points(radius * np.sin(angle), radius * np.cos(angle))],
    "heart": [_stack_points(16 * np.sin(t) ** 3, heart)],
    "moon": [np.concatenate(crescent)],
    "cross": [np.asarray(cross, float)],
    "ring": [_make_curve(1.0), _make_curve(0.56)],
    "arrow": [np.asarray(arrow, float)],
    "flower": [_make_curve(0.72, 0.28), _make_curve(0.2)],
    "fish": [body, np.asarray(tail, float)],
  }


@functools.cache
def build_silhouettes() -> dict[str, Float32[np.ndarray, "n n"]]:
  """Signed distance maps of the flat shapes, in map pixels, positive inside.

  A map covers the square [-0.5, 0.5] x [0, 1] (x across, y up; row 0 is the
  top), in which the outline has height 1.
  """
  zoom = 8  # Supersampling of the mask, for smooth distances.
  side = SILHOUETTE * zoom
  maps = {}
  for name, polygons in _make_outlines().items():
    points = np.concatenate(polygons)
    low, high = points.min(0), points.max(0)
    # 0.98 leaves a rim, so that every edge can be interpolated.
    scale = 0.98 / max(high - low)
    mask = np.zeros((side, side), np.uint8)
    shift = np.array([(low[0] + high[0]) / 2, low[1]])
    for polygon in polygons:
      unit = (polygon - shift) * scale
      pixel = np.stack([unit[:, 0] + 0.5, 0.99 - unit[:, 1]], -1) * side
      layer = np.zeros_like(mask)
      cv2.fillPoly(layer, [np.round(pixel).astype(np.int32)], 1)
      mask = mask | layer if name == "fish" else mask ^ layer
    inside = cv2.distanceTransform(mask, cv2.DIST_L2, 5)
    outside = cv2.distanceTransform(1 - mask, cv2.DIST_L2, 5)
    size, area = [SILHOUETTE] * 2, cv2.INTER_AREA
    maps[name] = cv2.resize((inside - outside) / zoom, size, interpolation=area)
  return maps
