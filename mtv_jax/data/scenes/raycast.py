"""Ray casting of built-in scenes.

Everything is solved in inverse depth w = 1 / z along camera rays (x, y, 1). In
w, a plane is affine in the pixel, a convex solid is a minimum of affine
functions against a maximum of affine functions, and a solid of revolution is
one quadratic. So an object costs a few passes over its rectangle of pixels.
"""

import functools
import math

import cv2
import numpy as np
from jaxtyping import UInt8

from mtv_jax.data.scenes import textures
from mtv_jax.data.scenes import world as world_lib
from mtv_jax.data.scenes.world import (
  Camera,
  Cutout,
  Polytope,
  Revolved,
  SceneObject,
  World,
)

BACKDROP, GROUND, OBJECTS = 0, 1, 2  # Owners of surfaces; objects: 2 + i.

_AMBIENT, _DIFFUSE = 0.58, 0.52  # Light: _AMBIENT + _DIFFUSE * cosine.
_MIN_INVERSE = 1e-6  # Minimum inverse depth of a hit, in 1 / m.
_SHADOW_END = 1.12  # End of a shadow, as a multiple of its radius.
_CORNERS = np.array(
  [(x, y, z) for x in (-1, 1) for y in (0, -1) for z in (-1, 1)], float
)

Box = tuple[slice, slice]


class Hits:
  """First hit of each ray from a camera into a world.

  Rays are given by float32 x and y in unit coordinates minus one half: [1, w]
  and [h, 1] for a pixel grid, or two arrays of equal shape. `ray_spacing` is
  the distance of neighbouring rays; it selects mipmap levels and locates
  objects on a grid.

  Attributes:
    inverse: float32 [h, w], inverse depth, 1 / m.
    u, v: float32 [h, w], texture coordinates in tiles.
    light: float32 [h, w], factor of colours.
    surface: uint8 [h, w], index of a surface in the following lists.
    colours: first colour, then second minus first; 0..255.
    tiles: (texels, left, top) of a texture in the atlas.
    surface_owners: see `owners`.
    boxes: bounding rows and columns of each object.
  """

  def __init__(self, world: World, camera: Camera, x, y, *, ray_spacing: float):
    self.world, self.camera, self.x, self.y = world, camera, x, y
    self.ray_spacing = ray_spacing
    self.is_grid = x.shape[0] == 1 and y.shape[1] == 1
    self.colours: list[list[float]] = []
    self.tiles: list[tuple[int, int, int]] = []
    self.surface_owners: list[int] = []
    k = 1 / camera.focal
    self.to_world = camera.rotation.T * np.array([k, k, 1.0])
    self._cast_background()
    for i, obj in enumerate(world.objects):
      rays = _ObjectRays(self, i, obj)
      if rays.x.shape[1] and rays.y.shape[0]:
        rays.cast()

  @functools.cached_property
  def owners(self) -> UInt8[np.ndarray, "h w"]:
    """What each ray hits: 0 backdrop, 1 ground, 2 + i for object i."""
    table = np.zeros((1, 256), np.uint8)
    table[0, : len(self.surface_owners)] = self.surface_owners
    return cv2.LUT(self.surface, table)

  def add_surface(self, texture: str, pair, level: int, owner: int) -> int:
    """Adds a surface with two colours and a texture; returns its index."""
    base, change = [], []
    for tint, a, b in zip(self.world.tint, *pair, strict=True):
      base.append(a * tint)
      change.append((b - a) * tint)
    self.colours.append(base + change)
    atlas = textures.build_atlas()
    level = min(max(level, 0), textures.LEVELS - 1)
    offset = atlas.offset_x[level], atlas.offset_y[texture]
    self.tiles.append((textures.TILE >> level, *offset))
    self.surface_owners.append(owner)
    return len(self.surface_owners) - 1

  def write(self, box: Box, hit, *values) -> None:
    """Records hits (inverse, u, v, light, surface) nearer than earlier ones."""
    hit &= values[0] > self.inverse[box]
    fields = (self.inverse, self.u, self.v, self.light, self.surface)
    for field, value in zip(fields, values, strict=True):
      np.copyto(field[box], value, where=hit)

  def level(self, metres: float, depth: float) -> int:
    """Mipmap level whose texels are about one pixel at this depth."""
    texels = (
      textures.TILE * depth * self.ray_spacing / (self.camera.focal * metres)
    )
    return round(math.log2(max(texels, 1)))

  def _bound_blocks(self, blocks: list[tuple]) -> list[Box]:
    """Bounds the rays that may hit upright blocks.

    A block is (x, y, z, half width, height, half depth), x, y, z its base.
    """
    shape = np.array([self.x.shape[1], self.y.shape[0]])
    values = np.array(blocks)[:, None]
    points = values[..., :3] + values[..., 3:] * _CORNERS
    points = (points - self.camera.position) @ self.camera.rotation.T
    depth = points[..., 2:]
    projected = points[..., :2] * (self.camera.focal / np.maximum(depth, 0.05))
    projected = projected * (1 / self.ray_spacing) + (shape / 2 - 0.5)
    low = np.ceil(projected.min(1)).clip(0, shape).astype(int)
    high = (np.floor(projected.max(1)) + 1).clip(0, shape).astype(int)
    if not self.is_grid or (depth < 0.05).any():
      covers_all = (depth.min(1)[:, 0] < 0.05) | (not self.is_grid)
      low[covers_all], high[covers_all] = 0, shape
    return [
      (slice(y0, y1), slice(x0, x1))
      for (x0, y0), (x1, y1) in zip(low.tolist(), high.tolist(), strict=True)
    ]

  def _cast_background(self) -> None:
    """Casts the ground and backdrop, with the objects' shadows."""
    world = self.world
    rows = self.to_world.tolist()
    dx, dy, dz = (_affine(row, self.x, self.y) for row in rows)
    cx, cy, cz = self.camera.position.tolist()
    sin, cos = math.sin(world.turn), math.cos(world.turn)
    floor = dy * (-1 / cy)
    scale = 1 / (world.distance - sin * cx - cos * cz)
    wall = (dx * sin + dz * cos) * scale
    is_ground = floor > wall
    self.inverse = np.maximum(floor, wall)
    depth = 1 / self.inverse
    px, pz = dx * depth + cx, dz * depth + cz
    pu, pv, qu, qv = world.offsets
    texture, metres, *pair = world_lib.BACKDROPS[world.backdrop]
    k = 1 / metres
    u = px * (k * cos) - pz * (k * sin) + qu
    v = dy * depth * k + (cy * k + qv)
    level = self.level(metres, world.distance)
    wall_surface = self.add_surface(texture, pair, level, BACKDROP)
    texture, metres, *pair = world_lib.GROUNDS[world.ground]
    k = 1 / metres
    self.u = np.where(is_ground, px * k + pu, u)
    self.v = np.where(is_ground, pz * k + pv, v)
    bands = self._add_ground_bands(texture, metres, pair, floor)
    self.surface = np.where(is_ground, bands, np.uint8(wall_surface))
    ground_light = np.float32(_AMBIENT - _DIFFUSE * world.light[1])
    self.light = np.where(is_ground, ground_light, np.float32(0.98))
    shadows = [_shadow(o, world.light) for o in world.objects if o.support < 0]
    blocks = [_make_block(obj) for obj in world.objects]
    for x, z, radius, _ in shadows:
      radius *= _SHADOW_END
      blocks.append((x, 0.0, z, radius, 0.0, radius))
    boxes = self._bound_blocks(blocks)
    count = len(world.objects)
    self.boxes = boxes[:count]
    for box, (x, z, radius, dark) in zip(boxes[count:], shadows, strict=True):
      # Multiplies light by 1 - dark at the centre, fading outwards.
      q = (px[box] - x) ** 2 + (pz[box] - z) ** 2
      q = q * (dark / radius**2) + (1 - _SHADOW_END**2 * dark)
      light = self.light[box]
      np.multiply(light, np.clip(q, 1 - dark, 1), light, where=is_ground[box])

  def _add_ground_bands(self, texture, metres, pair, floor) -> np.ndarray:
    """Adds ground surfaces, one mipmap level per band of depth."""
    # A pixel covers more ground in depth than across; the level follows the
    # geometric mean of both.
    height = -float(self.camera.position[1])
    scale = textures.TILE * self.ray_spacing / (self.camera.focal * metres)
    scale /= math.sqrt(height)
    start = len(self.surface_owners)
    for level in range(textures.LEVELS):
      self.add_surface(texture, pair, level, GROUND)
    # Without roll, the ground's depth depends only on the row.
    rows = floor[:, :1] if self.is_grid else floor
    level = np.log2(scale * np.maximum(rows, 0.02) ** -1.5) + 0.5
    return (start + np.clip(level, 0, textures.LEVELS - 1)).astype(np.uint8)


def _affine(row, x, y):
  """Affine function with coefficients for x, y and 1."""
  return (row[0] * x + row[2]) + row[1] * y


def _make_block(obj: SceneObject) -> tuple[float, ...]:
  """Block around an object, in the format of `_bound_blocks`."""
  half_x = half_z = obj.radius
  if obj.shape.flat:
    half_x *= abs(math.cos(obj.yaw))
    half_z *= abs(math.sin(obj.yaw))
  elif isinstance(obj.shape.parts[0], Polytope):
    half_x = half_z = 1.4143 * obj.radius  # Corners of a rotated square.
  return (obj.x, -obj.base, obj.z, half_x, obj.height, half_z)


def _shadow(obj: SceneObject, light) -> tuple[float, float, float, float]:
  """Shadow of an object on the ground: centre x and z, radius, darkness."""
  lx, ly, lz = light
  lean = 0.5 * (0.35 * obj.height + obj.base)
  radius = 1.25 * obj.radius + 0.3 * obj.base
  darkness = 0.6 / (1 + 1.2 * obj.base)
  return obj.x + lx / ly * lean, obj.z + lz / ly * lean, radius, darkness


class _ObjectRays:
  """Rays in an object's frame (x, u, z), in units of its height.

  At camera depth z, a point is `origin + direction * z`.
  """

  def __init__(self, hits: Hits, i: int, obj: SceneObject):
    self.hits, self.obj, self.owner = hits, obj, OBJECTS + i
    self.box = rows, columns = hits.boxes[i]
    self.x, self.y = hits.x[:, columns], hits.y[rows]
    cos, sin = math.cos(obj.yaw), math.sin(obj.yaw)
    frame = np.array([[cos, 0, -sin], [0, -1, 0], [sin, 0, cos]])
    self.start = hits.camera.position - np.array([obj.x, -obj.base, obj.z])
    self.rows = (frame @ hits.to_world / obj.height).tolist()
    self.origin = (frame @ self.start / obj.height).tolist()
    self.light = (frame @ np.array(hits.world.light)).tolist()
    metres, *self.offsets = obj.texture_map
    self.tiles = obj.height / metres  # Texture tiles per object height.

  @functools.cached_property
  def directions(self) -> list[np.ndarray]:
    return [_affine(row, self.x, self.y) for row in self.rows]

  def along(self, a: float, b: float, c: float) -> np.ndarray:
    """Component of all directions along (a, b, c)."""
    r, s, t = self.rows
    row = [a * r[i] + b * s[i] + c * t[i] for i in range(3)]
    return _affine(row, self.x, self.y)

  def coordinate(self, axis: int, depth: np.ndarray) -> np.ndarray:
    """Coordinate x (0), u (1) or z (2) of points at `depth`."""
    return self.directions[axis] * depth + self.origin[axis]

  def lambert(self, x: float, u: float, z: float) -> float:
    """Light on a flat face with this normal."""
    l = self.light
    cosine = (l[0] * x + l[1] * u + l[2] * z) / math.sqrt(x * x + u * u + z * z)
    return _AMBIENT + _DIFFUSE * max(cosine, 0.0)

  def write(self, hit, inverse, u, v, light, surface) -> None:
    """Records hits; texture coordinates exclude the offsets."""
    pu, pv = self.offsets
    self.hits.write(self.box, hit, inverse, u + pu, v + pv, light, surface)

  def cast(self) -> None:
    """Casts all parts of the object."""
    hits, obj = self.hits, self.obj
    depth = float(hits.camera.rotation[2] @ -self.start)
    level = hits.level(obj.texture_map[0], max(depth, 0.2))
    pair = world_lib.colours(obj)
    body = hits.add_surface(obj.texture, pair, level, self.owner)
    for part in obj.shape.parts:
      accent = body
      if part.accent:
        pair = (part.accent, world_lib.shade(part.accent))
        accent = hits.add_surface("plain", pair, level, self.owner)
      if isinstance(part, Revolved):
        self._cast_revolved(part, accent)
        self._cast_end(part, accent)
      elif isinstance(part, Polytope):
        self._cast_polytope(part, (body, accent))
      else:
        self._cast_cutout(part, body)

  def _cast_cutout(self, part: Cutout, surface: int) -> None:
    inverse = self.directions[2] * (-1 / self.origin[2])
    hit = inverse > _MIN_INVERSE
    depth = 1 / np.maximum(inverse, _MIN_INVERSE)
    across, up = self.coordinate(0, depth), self.coordinate(1, depth)
    n = textures.SILHOUETTE
    distance = cv2.remap(
      textures.build_silhouettes()[part.silhouette],
      across * n + (0.5 * n - 0.5),
      up * -n + (n - 0.5),
      cv2.INTER_LINEAR,
      borderMode=cv2.BORDER_CONSTANT,
      borderValue=-1,
    )
    hit &= distance > 0
    # Equal light on both sides, so that views agree on a board's brightness.
    light = _AMBIENT + _DIFFUSE * abs(self.light[2])
    k = self.tiles
    self.write(hit, inverse, across * k, up * -k, light, surface)

  def _cast_polytope(self, part: Polytope, surfaces: tuple[int, int]) -> None:
    ox, ou, oz = self.origin
    fronts, backs = [], []
    for f, (nx, nu, nz, offset) in enumerate(part.faces):
      distance = offset - (nx * ox + nu * ou + nz * oz)
      k = 1 / (distance if abs(distance) > 1e-9 else 1e-9)
      inverse = self.along(nx * k, nu * k, nz * k)
      # Rays enter through faces whose outer side faces the camera.
      (fronts if distance < 0 else backs).append((f, inverse))
    if not fronts:
      return
    entry = functools.reduce(np.minimum, [inverse for _, inverse in fronts])
    exit_ = functools.reduce(np.maximum, [inverse for _, inverse in backs])
    hit = entry > np.maximum(exit_, _MIN_INVERSE)
    depth = 1 / np.maximum(entry, _MIN_INVERSE)
    k = self.tiles
    for f, inverse in fronts:
      normal = part.faces[f][:3]
      axes = zip(_face_axes(normal), self.offsets, strict=True)
      uv = [
        self.along(k * a, k * b, k * c) * depth
        + (k * (a * ox + b * ou + c * oz) + shift)
        for (a, b, c), shift in axes
      ]
      light, surface = self.lambert(*normal), surfaces[f in part.accent_faces]
      front = hit & (inverse <= entry)
      self.hits.write(self.box, front, inverse, *uv, light, surface)

  def _cast_revolved(self, part: Revolved, surface: int) -> None:
    ox, ou, oz = self.origin
    dx, du, dz = self.directions
    a, b, c = part.a, part.b, part.c
    # On the surface x^2 + z^2 = a + b u + c u^2 with (x, u, z) = o + d / w:
    # p * w^2 + 2 q * w + r = 0; the larger root is the nearer point.
    p = ox * ox + oz * oz - a - ou * (b + c * ou)
    q = self.along(ox, -(0.5 * b + c * ou), oz)
    r = dx * dx + dz * dz
    if c:
      r -= c * (du * du)
    discriminant = r * -p + q * q
    inverse = np.sqrt(np.maximum(discriminant, 0)) - q
    inverse *= 1 / max(p, 1e-9)
    hit = (discriminant > 0) & (inverse > _MIN_INVERSE)
    depth = 1 / np.maximum(inverse, _MIN_INVERSE)
    x, up, z = (self.coordinate(axis, depth) for axis in range(3))
    hit &= (up >= part.low) & (up <= part.high)
    # Normal (x, -(b + 2 c u) / 2, z); its square is a polynomial in u.
    lx, lu, lz = self.light
    cosine = x * lx + z * lz - (up * (c * lu) + 0.5 * b * lu)
    squared_norm = (up * (c + c * c) + (b + b * c)) * up + (a + 0.25 * b * b)
    cosine /= np.sqrt(np.maximum(squared_norm, 1e-9))
    light = np.maximum(cosine, 0) * _DIFFUSE + _AMBIENT
    # Whole tiles per turn, so that the pattern closes.
    tiles = max(round(2 * math.pi * self.obj.shape.half * self.tiles), 1)
    u = np.arctan2(x, z) * (tiles / (2 * math.pi))
    self.write(hit, inverse, u, up * -self.tiles, light, surface)

  def _cast_end(self, part: Revolved, surface: int) -> None:
    """Casts the flat top, or the flat bottom if the camera is below."""
    ou = self.origin[1]
    if part.low <= ou <= part.high:
      return
    end, normal = (part.high, 1.0) if ou > part.high else (part.low, -1.0)
    radius2 = part.a + end * (part.b + part.c * end)
    if radius2 < 1e-6:
      return
    inverse = self.directions[1] * (1 / (end - ou))
    depth = 1 / np.maximum(inverse, _MIN_INVERSE)
    x, z = self.coordinate(0, depth), self.coordinate(2, depth)
    hit = (x * x + z * z <= radius2) & (inverse > _MIN_INVERSE)
    k = self.tiles
    light = self.lambert(0.0, normal, 0.0) * part.cap
    self.write(hit, inverse, x * k, z * k, light, surface)


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
