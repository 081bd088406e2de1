"""Casts the rays of a camera into a built-in scene.

What each ray meets first is left as depth, texture position, light and the
number of a surface, for `scene_paint` to turn into colours. `scene_solids`
has the intersections.

Rays may lie on a grid (a row of x against a column of y) or anywhere (x and y
of one shape); the second form is how exact correspondences are checked.
"""

import math

import numpy as np

from mtv_jax.data.scenes import solids, textures
from mtv_jax.data.scenes import world as scene_world
from mtv_jax.data.scenes.world import Camera, Polytope, Thing, World

BACKDROP, GROUND, THINGS = 0, 1, 2  # owners of surfaces

_SIGNS = np.array(
  [(x, y, z) for x in (-1, 1) for y in (0, -1) for z in (-1, 1)], float
)
_EVERYWHERE = (slice(None), slice(None))
_FADE = 1.12  # where a shadow ends, in reaches


def _block(thing: Thing) -> tuple[float, ...]:
  """A block around a thing, as `_Caster.boxes` takes it."""
  across = deep = thing.radius
  if thing.shape.flat:
    across *= abs(math.cos(thing.yaw))
    deep *= abs(math.sin(thing.yaw))
  elif isinstance(thing.shape.parts[0], Polytope):
    across = deep = 1.4143 * thing.radius  # the corners of a turned square
  return (thing.x, -thing.base, thing.z, across, thing.height, deep)


def trace(
  world: World, camera: Camera, x: np.ndarray, y: np.ndarray, *, pitch: float
) -> solids.Hits:
  """Casts rays from a camera into a world.

  Args:
    world: the scene.
    camera: where the rays start.
    x, y: float32, unit coordinates minus one half: [1, w] and [h, 1] for a
      grid of pixels, or two arrays of one shape for rays anywhere.
    pitch: distance of neighbouring rays in unit coordinates. It bounds the
      detail of textures (mipmaps) and places things on a grid.
  """
  caster = _Caster(world, camera, x, y, pitch)
  hits = caster.background()
  for i, thing in enumerate(world.things):
    caster.thing(i, thing, hits)
  return hits


class _Caster:
  def __init__(self, world: World, camera: Camera, x, y, pitch: float):
    self.world, self.camera, self.pitch = world, camera, pitch
    self.x, self.y = x, y
    self.grid = x.shape[0] == 1 and y.shape[1] == 1
    self.surfaces = solids.Surfaces([], [], [])
    k = 1 / camera.focal
    self.to_world = camera.rotation.T * np.array([k, k, 1.0])
    self.light = np.array(world.light)

  def surface(self, texture: str, pair, level: int, owner: int) -> int:
    """Adds a surface to the table and returns its number."""
    (r, g, b), (r2, g2, b2) = pair
    tr, tg, tb = self.world.tint
    table, atlas = self.surfaces, textures.atlas()
    table.colours.append(
      [r * tr, g * tg, b * tb, (r2 - r) * tr, (g2 - g) * tg, (b2 - b) * tb]
    )
    level = min(max(level, 0), textures.LEVELS - 1)
    table.tiles.append(
      (textures.TILE >> level, atlas.offset_x[level], atlas.offset_y[texture])
    )
    table.owners.append(owner)
    return len(table.owners) - 1

  def level(self, metres: float, depth: float) -> int:
    """The mipmap whose texels are about one pixel at this depth."""
    texels = textures.TILE * depth * self.pitch / (self.camera.focal * metres)
    return round(math.log2(max(texels, 1)))

  def boxes(self, blocks: list[tuple]) -> list[solids.Box]:
    """Pixels that may show upright blocks.

    A block is the middle of its base (x, y, z) and its half width, height and
    half depth.
    """
    if not self.grid:
      return [_EVERYWHERE] * len(blocks)
    h, w = self.y.shape[0], self.x.shape[1]
    corners = np.array(blocks)[:, None]
    points = corners[..., :3] + corners[..., 3:] * _SIGNS
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
    for (x0, y0), (x1, y1), wide in zip(low, high, behind, strict=True):
      if wide:
        boxes.append(_EVERYWHERE)
        continue
      rows = slice(min(max(int(y0), 0), h), max(min(int(y1) + 1, h), 0))
      columns = slice(min(max(int(x0), 0), w), max(min(int(x1) + 1, w), 0))
      boxes.append((rows, columns))
    return boxes

  def background(self) -> solids.Hits:
    """Ground and backdrop everywhere, with the shadows of the things."""
    world, x, y = self.world, self.x, self.y
    dx, dy, dz = (solids.affine(row, x, y) for row in self.to_world.tolist())
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
    pu, pv, qu, qv = world.paint
    wall_texture, metres, *pair = scene_world.BACKDROPS[world.backdrop]
    k = 1 / metres
    u = px * (k * cos)
    u -= pz * (k * sin)
    u += qu
    v = dy * depth
    v *= k
    v += cy * k + qv
    wall = self.surface(
      wall_texture, pair, self.level(metres, world.distance), BACKDROP
    )
    texture, metres, *pair = scene_world.GROUNDS[world.ground]
    k = 1 / metres
    np.copyto(u, px * k + pu, where=ground)
    np.copyto(v, pz * k + pv, where=ground)
    number = np.full(inverse.shape, wall, np.uint8)
    np.copyto(number, self._bands(texture, metres, pair, floor), where=ground)
    light = np.full(inverse.shape, 0.98, np.float32)
    np.copyto(
      light, solids.AMBIENT - solids.DIFFUSE * world.light[1], where=ground
    )
    spots, things = self._spots(), world.things
    blocks = [_block(thing) for thing in things]
    for spot_x, spot_z, reach, _ in spots:
      reach *= _FADE
      blocks.append((spot_x, 0.0, spot_z, reach, 0.0, reach))
    boxes = self.boxes(blocks)
    self._shadows(spots, boxes[len(things) :], px, pz, ground, light)
    return solids.Hits(
      inverse, u, v, light, number, self.surfaces, boxes[: len(things)]
    )

  def _bands(self, texture, metres, pair, floor) -> np.ndarray:
    """Surface numbers of the ground: a mipmap for each band of depth."""
    # A pixel covers more of the ground in depth than across; the geometric
    # mean of the two picks the mipmap.
    height = -float(self.camera.position[1])
    scale = textures.TILE * self.pitch / (self.camera.focal * metres)
    scale /= math.sqrt(height)
    first = len(self.surfaces.owners)
    for level in range(textures.LEVELS):
      self.surface(texture, pair, level, GROUND)
    # Without roll the depth of the ground depends on the row alone.
    rows = floor[:, :1] if self.grid else floor
    level = np.log2(scale * np.maximum(rows, 0.02) ** -1.5) + 0.5
    return (first + np.clip(level, 0, textures.LEVELS - 1)).astype(np.uint8)

  def _spots(self) -> list[tuple[float, float, float, float]]:
    """Shadows on the ground: middle x and z, reach, darkness."""
    lx, ly, lz = self.world.light
    spots = []
    for thing in self.world.things:
      if thing.support < 0:
        lean = 0.5 * (0.35 * thing.height + thing.base)
        reach = 1.25 * thing.radius + 0.3 * thing.base
        dark = 0.6 / (1 + 1.2 * thing.base)
        x, z = thing.x + lx / ly * lean, thing.z + lz / ly * lean
        spots.append((x, z, reach, dark))
    return spots

  def _shadows(self, spots, boxes, px, pz, ground, light) -> None:
    """Darkens the ground there: 1 - dark in the middle, fading outwards."""
    for box, (x, z, reach, dark) in zip(boxes, spots, strict=True):
      q = px[box] - x
      q *= q
      other = pz[box] - z
      other *= other
      q += other
      q *= dark / reach**2
      q += 1 - _FADE**2 * dark
      np.clip(q, 1 - dark, 1, out=q)
      np.multiply(light[box], q, out=light[box], where=ground[box])

  def thing(self, i: int, thing: Thing, hits: solids.Hits) -> None:
    box = hits.boxes[i]
    rows, columns = box
    x, y = self.x, self.y
    if self.grid:
      x, y = x[:, columns], y[rows]
    if x.shape[1] == 0 or y.shape[0] == 0:
      return
    cos, sin = math.cos(thing.yaw), math.sin(thing.yaw)
    frame = np.array([[cos, 0, -sin], [0, -1, 0], [sin, 0, cos]])
    place = self.camera.position - np.array([thing.x, -thing.base, thing.z])
    local = solids.Local(
      rows=(frame @ self.to_world / thing.height).tolist(),
      origin=(frame @ place / thing.height).tolist(),
      light=(frame @ self.light).tolist(),
      x=x,
      y=y,
    )
    depth = float(self.camera.rotation[2] @ -place)
    level = self.level(thing.paint[0], max(depth, 0.2))
    body = self.surface(
      thing.texture, scene_world.colours(thing), level, THINGS + i
    )
    for part in thing.shape.parts:
      accent = body
      if getattr(part, "accent", None):
        pair = (part.accent, scene_world.shade_of(part.accent))
        accent = self.surface("plain", pair, level, THINGS + i)
      solids.meet(part, thing, local, (body, accent), hits, box)
