"""Ray casting of built-in scenes.

What each ray hits first is recorded as depth, texture coordinates, light and
the number of a surface, from which `shading` computes colours.

Everything is solved in inverse depth w = 1 / z along rays (x, y, 1) of the
camera. In w a plane is affine in the pixel, a convex solid is the minimum of
some affine functions against the maximum of others, and a solid of revolution
is one quadratic, so that an object costs a few passes over its own rectangle
of pixels.

Rays lie on a grid (a row of x against a column of y) or anywhere (x and y of
one shape); the second form checks exact correspondences.
"""

import dataclasses
import functools
import math

import cv2
import numpy as np

from mtv_jax.data.scenes import textures
from mtv_jax.data.scenes import world as world_lib
from mtv_jax.data.scenes.shapes import Cutout, Polytope, Revolved
from mtv_jax.data.scenes.world import Camera, SceneObject, World

BACKDROP, GROUND, OBJECTS = 0, 1, 2  # owners of surfaces

_AMBIENT, _DIFFUSE = 0.58, 0.52  # light: _AMBIENT + _DIFFUSE * cosine
_MIN_INVERSE = 1e-6  # least inverse depth that counts as a hit, 1 / m
_SHADOW_END = 1.12  # where a shadow ends, as a multiple of its radius
_EVERYWHERE = (slice(None), slice(None))
_CORNERS = np.array(
  [(x, y, z) for x in (-1, 1) for y in (0, -1) for z in (-1, 1)], float
)

Box = tuple[slice, slice]


@dataclasses.dataclass
class Surfaces:
  """The table that surface numbers index."""

  tint: tuple[float, float, float]
  colours: list[list[float]]  # first colour, then second minus first; 0..255
  tiles: list[tuple[int, int, int]]  # texels, left, top in the atlas
  owners: list[int]  # 0 backdrop, 1 ground, 2 + i for object i

  def add(self, texture: str, pair, level: int, owner: int) -> int:
    """Adds a surface of two colours and a texture; returns its number."""
    (r, g, b), (r2, g2, b2) = pair
    tr, tg, tb = self.tint
    atlas = textures.atlas()
    self.colours.append(
      [r * tr, g * tg, b * tb, (r2 - r) * tr, (g2 - g) * tg, (b2 - b) * tb]
    )
    level = min(max(level, 0), textures.LEVELS - 1)
    self.tiles.append(
      (textures.TILE >> level, atlas.offset_x[level], atlas.offset_y[texture])
    )
    self.owners.append(owner)
    return len(self.owners) - 1


@dataclasses.dataclass
class Hits:
  """First hit of each ray; arrays have the shape of the rays.

  `u`, `v` are texture coordinates in tiles; `boxes[i]` bounds object i.
  """

  inverse: np.ndarray  # inverse depth, float32, 1 / m
  u: np.ndarray
  v: np.ndarray
  light: np.ndarray
  number: np.ndarray  # uint8, index into `surfaces`
  surfaces: Surfaces
  boxes: list[Box]

  def write(self, box: Box, hit, inverse, u, v, light, number) -> None:
    """Records hits that are nearer than all before."""
    target = self.inverse[box]
    hit &= inverse > target
    np.copyto(target, inverse, where=hit)
    np.copyto(self.u[box], u, where=hit)
    np.copyto(self.v[box], v, where=hit)
    np.copyto(self.light[box], light, where=hit)
    np.copyto(self.number[box], number, where=hit)


def _affine(row, x, y):
  """The affine function of pixels with coefficients of x, y and 1."""
  return (row[0] * x + row[2]) + row[1] * y


def cast_rays(
  world: World, camera: Camera, x: np.ndarray, y: np.ndarray, *, pitch: float
) -> Hits:
  """Casts rays from a camera into a world.

  Args:
    world: the scene.
    camera: where the rays start.
    x, y: float32, unit coordinates minus one half: [1, w] and [h, 1] for a
      grid of pixels, or two arrays of one shape for rays anywhere.
    pitch: distance of neighbouring rays in unit coordinates. It bounds the
      detail of textures (mipmaps) and locates objects on a grid.
  """
  caster = _Caster(world, camera, x, y, pitch)
  hits = caster.cast_background()
  for i, obj in enumerate(world.objects):
    caster.cast_object(i, obj, hits)
  return hits


class _Caster:
  def __init__(self, world: World, camera: Camera, x, y, pitch: float):
    self.world, self.camera, self.pitch = world, camera, pitch
    self.x, self.y = x, y
    self.grid = x.shape[0] == 1 and y.shape[1] == 1
    self.surfaces = Surfaces(world.tint, [], [], [])
    k = 1 / camera.focal
    self.to_world = camera.rotation.T * np.array([k, k, 1.0])
    self.light = np.array(world.light)

  def level(self, metres: float, depth: float) -> int:
    """The mipmap level whose texels are about one pixel at this depth."""
    texels = textures.TILE * depth * self.pitch / (self.camera.focal * metres)
    return round(math.log2(max(texels, 1)))

  def boxes(self, blocks: list[tuple]) -> list[Box]:
    """Pixels that may show upright blocks.

    A block is the middle of its base (x, y, z) and its half width, height and
    half depth.
    """
    if not self.grid:
      return [_EVERYWHERE] * len(blocks)
    h, w = self.y.shape[0], self.x.shape[1]
    values = np.array(blocks)[:, None]
    points = values[..., :3] + values[..., 3:] * _CORNERS
    points = (points - self.camera.position) @ self.camera.rotation.T
    depth = points[..., 2]
    behind = (depth.min(1) < 0.05).tolist()
    flat = (
      points[..., :2] * (self.camera.focal / np.maximum(depth, 0.05))[..., None]
    )
    flat *= 1 / self.pitch
    flat += np.array([w / 2 - 0.5, h / 2 - 0.5])
    low = np.ceil(flat.min(1)).tolist()
    high = np.floor(flat.max(1)).tolist()
    boxes = []
    for (x0, y0), (x1, y1), everywhere in zip(low, high, behind, strict=True):
      rows = slice(min(max(int(y0), 0), h), max(min(int(y1) + 1, h), 0))
      columns = slice(min(max(int(x0), 0), w), max(min(int(x1) + 1, w), 0))
      boxes.append(_EVERYWHERE if everywhere else (rows, columns))
    return boxes

  def cast_background(self) -> Hits:
    """Ground and backdrop everywhere, with the shadows of the objects."""
    world, x, y = self.world, self.x, self.y
    dx, dy, dz = (_affine(row, x, y) for row in self.to_world.tolist())
    cx, cy, cz = self.camera.position.tolist()
    sin, cos = math.sin(world.turn), math.cos(world.turn)
    floor = dy * (-1 / cy)
    inverse = dx * sin
    inverse += dz * cos
    inverse *= 1 / (world.distance - sin * cx - cos * cz)
    ground = floor > inverse
    np.maximum(floor, inverse, out=inverse)
    depth = 1 / inverse
    px = dx * depth
    px += cx
    pz = dz * depth
    pz += cz
    pu, pv, qu, qv = world.offsets
    texture, metres, *pair = world_lib.BACKDROPS[world.backdrop]
    k = 1 / metres
    u = px * (k * cos)
    u -= pz * (k * sin)
    u += qu
    v = dy * depth
    v *= k
    v += cy * k + qv
    level = self.level(metres, world.distance)
    wall = self.surfaces.add(texture, pair, level, BACKDROP)
    texture, metres, *pair = world_lib.GROUNDS[world.ground]
    k = 1 / metres
    np.copyto(u, px * k + pu, where=ground)
    np.copyto(v, pz * k + pv, where=ground)
    number = np.full(inverse.shape, wall, np.uint8)
    bands = self._ground_bands(texture, metres, pair, floor)
    np.copyto(number, bands, where=ground)
    light = np.full(inverse.shape, 0.98, np.float32)
    np.copyto(light, _AMBIENT - _DIFFUSE * world.light[1], where=ground)
    shadows = [_shadow(o, world.light) for o in world.objects if o.support < 0]
    blocks = [_bounding_block(obj) for obj in world.objects]
    for shadow_x, shadow_z, radius, _ in shadows:
      radius *= _SHADOW_END
      blocks.append((shadow_x, 0.0, shadow_z, radius, 0.0, radius))
    boxes = self.boxes(blocks)
    count = len(world.objects)
    for box, shadow in zip(boxes[count:], shadows, strict=True):
      _cast_shadow(shadow, px[box], pz[box], ground[box], light[box])
    return Hits(inverse, u, v, light, number, self.surfaces, boxes[:count])

  def _ground_bands(self, texture, metres, pair, floor) -> np.ndarray:
    """Surface numbers of the ground: a mipmap level for each band of depth."""
    # A pixel covers more of the ground in depth than across; the geometric
    # mean of the two picks the level.
    height = -float(self.camera.position[1])
    scale = textures.TILE * self.pitch / (self.camera.focal * metres)
    scale /= math.sqrt(height)
    first = len(self.surfaces.owners)
    for level in range(textures.LEVELS):
      self.surfaces.add(texture, pair, level, GROUND)
    # Without roll the depth of the ground depends on the row alone.
    rows = floor[:, :1] if self.grid else floor
    level = np.log2(scale * np.maximum(rows, 0.02) ** -1.5) + 0.5
    return (first + np.clip(level, 0, textures.LEVELS - 1)).astype(np.uint8)

  def cast_object(self, i: int, obj: SceneObject, hits: Hits) -> None:
    """Records the hits of object i."""
    rows, columns = hits.boxes[i]
    x, y = self.x, self.y
    if self.grid:
      x, y = x[:, columns], y[rows]
    if x.shape[1] == 0 or y.shape[0] == 0:
      return
    cos, sin = math.cos(obj.yaw), math.sin(obj.yaw)
    frame = np.array([[cos, 0, -sin], [0, -1, 0], [sin, 0, cos]])
    start = self.camera.position - np.array([obj.x, -obj.base, obj.z])
    metres, *offsets = obj.texture_map
    rays = _LocalRays(
      rows=(frame @ self.to_world / obj.height).tolist(),
      origin=(frame @ start / obj.height).tolist(),
      light=(frame @ self.light).tolist(),
      x=x,
      y=y,
      tiles=obj.height / metres,
      offsets=offsets,
      hits=hits,
      box=hits.boxes[i],
    )
    depth = float(self.camera.rotation[2] @ -start)
    level = self.level(metres, max(depth, 0.2))
    pair = world_lib.colours(obj)
    body = self.surfaces.add(obj.texture, pair, level, OBJECTS + i)
    for part in obj.shape.parts:
      accent = body
      if part.accent:
        pair = (part.accent, world_lib.shade(part.accent))
        accent = self.surfaces.add("plain", pair, level, OBJECTS + i)
      if isinstance(part, Revolved):
        _cast_revolved(part, rays, accent, half_width=obj.shape.half)
      elif isinstance(part, Polytope):
        _cast_polytope(part, rays, (body, accent))
      else:
        _cast_cutout(part, rays, body)


def _bounding_block(obj: SceneObject) -> tuple[float, ...]:
  """A block around an object, as `_Caster.boxes` takes it."""
  across = deep = obj.radius
  if obj.shape.flat:
    across *= abs(math.cos(obj.yaw))
    deep *= abs(math.sin(obj.yaw))
  elif isinstance(obj.shape.parts[0], Polytope):
    across = deep = 1.4143 * obj.radius  # the corners of a turned square
  return (obj.x, -obj.base, obj.z, across, obj.height, deep)


def _shadow(obj: SceneObject, light) -> tuple[float, float, float, float]:
  """Shadow of an object on the ground: middle x and z, radius, darkness."""
  lx, ly, lz = light
  lean = 0.5 * (0.35 * obj.height + obj.base)
  radius = 1.25 * obj.radius + 0.3 * obj.base
  dark = 0.6 / (1 + 1.2 * obj.base)
  return obj.x + lx / ly * lean, obj.z + lz / ly * lean, radius, dark


def _cast_shadow(shadow, px, pz, ground, light) -> None:
  """Multiplies `light` by 1 - darkness in the middle, fading outwards."""
  x, z, radius, dark = shadow
  q = px - x
  q *= q
  other = pz - z
  other *= other
  q += other
  q *= dark / radius**2
  q += 1 - _SHADOW_END**2 * dark
  np.clip(q, 1 - dark, 1, out=q)
  np.multiply(light, q, out=light, where=ground)


@dataclasses.dataclass(frozen=True)
class _LocalRays:
  """Rays in an object's frame (x, u, z), in units of its height.

  A point is `origin + direction * z` for the depth z of the camera.
  """

  rows: list[list[float]]  # (x, y, 1) of a ray -> direction
  origin: list[float]
  light: list[float]
  x: np.ndarray
  y: np.ndarray
  tiles: float  # of the texture, to the object's height
  offsets: list[float]  # of the texture
  hits: Hits
  box: Box

  @functools.cached_property
  def directions(self) -> list[np.ndarray]:
    return [_affine(row, self.x, self.y) for row in self.rows]

  def along(self, a: float, b: float, c: float) -> np.ndarray:
    """The component of all directions along (a, b, c)."""
    r, s, t = self.rows
    row = [a * r[i] + b * s[i] + c * t[i] for i in range(3)]
    return _affine(row, self.x, self.y)

  def coordinate(self, axis: int, depth: np.ndarray) -> np.ndarray:
    """Coordinate x (0), u (1) or z (2) of the points at `depth`."""
    value = self.directions[axis] * depth
    value += self.origin[axis]
    return value

  def lambert(self, x: float, u: float, z: float) -> float:
    """Light on a flat face with this normal."""
    l = self.light
    length = math.sqrt(x * x + u * u + z * z)
    return _AMBIENT + _DIFFUSE * max(
      (l[0] * x + l[1] * u + l[2] * z) / length, 0.0
    )

  def write(self, hit, inverse, u, v, light, number) -> None:
    """Records hits; texture coordinates come without their offsets."""
    pu, pv = self.offsets
    self.hits.write(self.box, hit, inverse, u + pu, v + pv, light, number)


def _cast_cutout(part: Cutout, rays: _LocalRays, number: int) -> None:
  inverse = rays.directions[2] * (-1 / rays.origin[2])
  hit = inverse > _MIN_INVERSE
  depth = 1 / np.maximum(inverse, _MIN_INVERSE)
  across, up = rays.coordinate(0, depth), rays.coordinate(1, depth)
  n = textures.SILHOUETTE
  inside = cv2.remap(
    textures.silhouettes()[part.silhouette],
    across * n + (0.5 * n - 0.5),
    up * -n + (n - 0.5),
    cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=-1,
  )
  hit &= inside > 0
  # Both sides are lit alike, so that views agree on a board's brightness.
  light = _AMBIENT + _DIFFUSE * abs(rays.light[2])
  k = rays.tiles
  rays.write(hit, inverse, across * k, up * -k, light, number)


def _cast_polytope(
  part: Polytope, rays: _LocalRays, numbers: tuple[int, int]
) -> None:
  ox, ou, oz = rays.origin
  entered, left = None, None
  fronts = []
  for f, (nx, nu, nz, offset) in enumerate(part.faces):
    room = offset - (nx * ox + nu * ou + nz * oz)
    k = 1 / (room if abs(room) > 1e-9 else 1e-9)
    inverse = rays.along(nx * k, nu * k, nz * k)
    if room < 0:  # the camera is on the outer side: rays enter here
      fronts.append((f, inverse))
      entered = inverse if entered is None else np.minimum(entered, inverse)
    else:
      left = inverse if left is None else np.maximum(left, inverse)
  if entered is None:
    return
  hit = entered > np.maximum(left, _MIN_INVERSE)
  depth = 1 / np.maximum(entered, _MIN_INVERSE)
  k, offsets = rays.tiles, rays.offsets
  for f, inverse in fronts:
    normal, coordinates = part.faces[f][:3], []
    for (a, b, c), shift in zip(_face_axes(normal), offsets, strict=True):
      value = rays.along(k * a, k * b, k * c) * depth
      value += k * (a * ox + b * ou + c * oz) + shift
      coordinates.append(value)
    light, number = rays.lambert(*normal), numbers[f in part.accented]
    front = hit & (inverse <= entered)
    rays.hits.write(rays.box, front, inverse, *coordinates, light, number)


@functools.cache
def _face_axes(normal: tuple) -> tuple[tuple, tuple]:
  """Unit vectors across and down a face, for its texture."""
  nx, nu, nz = normal
  flat = math.hypot(nx, nz)
  if flat < 1e-9:
    return (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
  across = (nz / flat, 0.0, -nx / flat)
  length = math.hypot(flat, nu)
  nx, nu, nz = nx / length, nu / length, nz / length
  down = (nx * nu * length / flat, -flat / length, nz * nu * length / flat)
  return across, down


def _cast_revolved(
  part: Revolved, rays: _LocalRays, number: int, *, half_width: float
) -> None:
  ox, ou, oz = rays.origin
  dx, du, dz = rays.directions
  a, b, c = part.a, part.b, part.c
  # On the surface x^2 + z^2 = a + b u + c u^2 with (x, u, z) = o + d / w:
  # outside * w^2 + 2 half * w + square = 0; the greater root is the nearer.
  outside = ox * ox + oz * oz - a - ou * (b + c * ou)
  half = rays.along(ox, -(0.5 * b + c * ou), oz)
  square = dx * dx
  square += dz * dz
  if c:
    square -= c * (du * du)
  square *= -outside
  square += half * half
  hit = square > 0
  inverse = np.sqrt(np.maximum(square, 0))
  inverse -= half
  inverse *= 1 / max(outside, 1e-9)
  hit &= inverse > _MIN_INVERSE
  depth = 1 / np.maximum(inverse, _MIN_INVERSE)
  x, up, z = (rays.coordinate(axis, depth) for axis in range(3))
  hit &= (up >= part.low) & (up <= part.high)
  # The normal (x, -(b + 2 c u) / 2, z); its square is a polynomial in u.
  lx, lu, lz = rays.light
  light = x * lx
  light += z * lz
  light -= up * (c * lu) + 0.5 * b * lu
  length = up * (c + c * c)
  length += b + b * c
  length *= up
  length += a + 0.25 * b * b
  light /= np.sqrt(np.maximum(length, 1e-9))
  np.maximum(light, 0, out=light)
  light *= _DIFFUSE
  light += _AMBIENT
  # A whole number of tiles around, so that the pattern closes.
  tiles = max(round(2 * math.pi * half_width * rays.tiles), 1)
  u = np.arctan2(x, z)
  u *= tiles / (2 * math.pi)
  rays.write(hit, inverse, u, up * -rays.tiles, light, number)
  _cast_end(part, rays, number)


def _cast_end(part: Revolved, rays: _LocalRays, number: int) -> None:
  """The flat top, or for a camera below it the flat bottom."""
  ou = rays.origin[1]
  if ou > part.high:
    end, normal = part.high, 1.0
  elif ou < part.low:
    end, normal = part.low, -1.0
  else:
    return
  radius2 = part.a + end * (part.b + part.c * end)
  if radius2 < 1e-6:
    return
  inverse = rays.directions[1] * (1 / (end - ou))
  depth = 1 / np.maximum(inverse, _MIN_INVERSE)
  x, z = rays.coordinate(0, depth), rays.coordinate(2, depth)
  hit = x * x + z * z <= radius2
  hit &= inverse > _MIN_INVERSE
  k = rays.tiles
  light = rays.lambert(0.0, normal, 0.0) * part.cap
  rays.write(hit, inverse, x * k, z * k, light, number)
