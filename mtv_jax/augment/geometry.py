"""Which part of a canvas a view shows, and how everything follows it.

A region is `(y0, x0, y1, x1)` in the unit square of the canvas, the whole
picture squashed to a square. Crop, flip and resize together are one region and
one bit; pixels, dense maps and boxes are all taken from those two, so that
they can't drift apart.

Resampling is two small matrix products: rows, then columns. The weights are
those of Pillow's `resize(size, BILINEAR, box=...)`: a triangle as wide as an
output pixel where the picture shrinks, whose feet may reach past the region
into the canvas around it.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.augment import random as draws
from mtv_jax.utils.errors import ConfigError

# torchvision's RandomResizedCrop draws as often before it gives up.
CANDIDATES = 10


@dataclasses.dataclass(frozen=True)
class Resize:
  """`resize(S)`: the whole canvas, `S` x `S` pixels."""

  size: int

  def __post_init__(self):
    draws.check_size("resize", self.size)

  def draws(self) -> int:
    """Uniform numbers needed."""
    return 0

  def region(
    self, image_size: Int[Array, "2"], u: Float[Array, "0"]
  ) -> Float[Array, "4"]:
    """The unit square."""
    del image_size, u
    return jnp.array([0.0, 0.0, 1.0, 1.0])


@dataclasses.dataclass(frozen=True)
class Crop:
  """`crop(S, min_area, max_area, ratio)`: a random region, `S` x `S` pixels.

  Area and aspect ratio are drawn as torchvision's RandomResizedCrop draws
  them, in the geometry of the original picture: a canvas is squashed, and a
  square of it is not a square of the photo. The default area is that of
  DINOv2's global crops; its local ones are `crop(96, 0.05, 0.32)`.

  Attributes:
    size: pixels a side.
    min_area: smallest share of the picture's area.
    max_area: largest share.
    ratio: range of width over height, drawn log-uniformly.
  """

  size: int
  min_area: float | int = 0.32
  max_area: float | int = 1.0
  ratio: tuple[float | int, float | int] = (3 / 4, 4 / 3)

  def __post_init__(self):
    draws.check_size("crop", self.size)
    draws.check_range("crop", "min_area", self.min_area, high=1.0)
    draws.check_range("crop", "max_area", self.max_area, high=1.0)
    if not 0 < self.min_area <= self.max_area:
      raise ConfigError(
        f"crop: areas from {self.min_area} to {self.max_area} of the picture; "
        "expected 0 < min_area <= max_area <= 1."
      )
    draws.check_pair("crop", "ratio", self.ratio)

  def draws(self) -> int:
    """Uniform numbers needed."""
    return 2 * CANDIDATES + 2

  def region(
    self, image_size: Int[Array, "2"], u: Float[Array, "draws"]
  ) -> Float[Array, "4"]:
    """A random region.

    Args:
      image_size: height and width of the original picture.
      u: uniform numbers.
    """
    size = jnp.maximum(image_size, 1).astype(jnp.float32)
    shape = size[1] / size[0]  # The picture's own width over height.
    low, high = (math.log(r) for r in self.ratio)
    area = draws.between(u[:CANDIDATES], self.min_area, self.max_area)
    ratio = jnp.exp(draws.between(u[CANDIDATES : 2 * CANDIDATES], low, high))
    heights = jnp.sqrt(area / ratio * shape)
    widths = jnp.sqrt(area * ratio / shape)
    fits = (heights <= 1.0) & (widths <= 1.0)
    first = jnp.argmax(fits)
    # None fits: the largest centred region of an allowed ratio.
    allowed = jnp.clip(shape, *self.ratio)
    extent = jnp.where(
      fits.any(),
      jnp.stack([heights[first], widths[first]]),
      jnp.minimum(1.0, jnp.stack([shape / allowed, allowed / shape])),
    )
    place = jnp.where(fits.any(), u[-2:], 0.5)
    corner = place * (1.0 - extent)
    return jnp.concatenate([corner, jnp.minimum(corner + extent, 1.0)])


@dataclasses.dataclass(frozen=True)
class Flip:
  """`flip(p)`: mirrors left and right with probability `p`."""

  p: float | int = 0.5

  def __post_init__(self):
    draws.check_range("flip", "p", self.p, high=1.0)

  def draws(self) -> int:
    """Uniform numbers needed."""
    return 1

  def flipped(self, u: Float[Array, "1"]) -> Bool[Array, ""]:
    """Whether this view is mirrored."""
    return draws.coin(u[0], self.p)


def weights(
  start: Float[Array, ""],
  stop: Float[Array, ""],
  *,
  source: int,
  target: int,
) -> Float[Array, "target source"]:
  """Antialiased linear resampling of one axis, as a matrix.

  Args:
    start: where the first output pixel begins, in the unit interval.
    stop: where the last one ends; before `start`, the axis is mirrored.
    source: pixels of the axis.
    target: pixels to make.

  Returns:
    Rows that sum to one, in float32. Every row has a pixel within half a
    pixel of its centre, so that no region is too small.
  """
  step = (stop - start) / target
  centres = start + (jnp.arange(target) + 0.5) * step
  pixels = (jnp.arange(source) + 0.5) / source
  # In source pixels: an output pixel is never narrower than one of them.
  radius = jnp.maximum(jnp.abs(step) * source, 1.0)
  distance = jnp.abs(centres[:, None] - pixels[None, :]) * source
  triangle = jnp.maximum(1.0 - distance / radius, 0.0)
  return triangle / triangle.sum(axis=1, keepdims=True)


def matrix_product(
  left: Float[Array, "y h"],
  planes: Float[Array, "c h w"],
  right: Float[Array, "x w"],
) -> Float[Array, "c y x"]:
  """`left @ planes @ right.T`, in the dtype of `planes`, summed in float32.

  Returns:
    float32.
  """
  # A TPU multiplies float32 in bfloat16 unless told otherwise; who asks for
  # float32 views wants them.
  precision = jax.lax.Precision.HIGHEST if planes.dtype == jnp.float32 else None
  product = functools.partial(
    jnp.einsum, precision=precision, preferred_element_type=jnp.float32
  )
  dtype = planes.dtype
  half = product("yh,chw->cyw", left.astype(dtype), planes)
  return product("xw,cyw->cyx", right.astype(dtype), half.astype(dtype))


def resample(
  planes: Float[Array, "c h w"],
  region: Float[Array, "4"],
  flipped: Bool[Array, ""],
  *,
  size: int,
) -> Float[Array, "c {size} {size}"]:
  """The region of `planes` as `size` x `size` pixels, antialiased.

  The products run in the dtype of `planes`; the weights are computed and the
  result is returned in float32.
  """
  y0, x0, y1, x1 = region
  # Mirroring costs nothing: the columns are read from the other end.
  left = jnp.where(flipped, x1, x0)
  right = jnp.where(flipped, x0, x1)
  height, width = planes.shape[1:]
  return matrix_product(
    weights(y0, y1, source=height, target=size),
    planes,
    weights(left, right, source=width, target=size),
  )


def crop_maps(
  values: Float[Array, "b h w"],
  valid: Bool[Array, "b h w"],
  box: Float[Array, "b count 4"],
  flipped: Bool[Array, "b count"],
  *,
  size: int,
) -> tuple[
  Float[Array, "b count {size} {size}"], Bool[Array, "b count {size} {size}"]
]:
  """Cuts a dense label map as the views were cut.

  Values times mask and the mask are resampled with the same weights and
  divided: a pixel is the mean of the labelled pixels under it, and a hole does
  not leak into its rim. Sizes of map, canvas and view may all differ.

  Args:
    values: such as inverse depth. Values that are NaN or infinite count as
      missing.
    valid: which pixels have a label.
    box: the views' regions, `Made.box`.
    flipped: `Made.flipped`.
    size: pixels a side of the result.

  Returns:
    The maps, zero where invalid, and which pixels are valid: those more than
    half of whose weight fell on labels.
  """
  valid = valid & jnp.isfinite(values)
  planes = jnp.stack(
    [jnp.where(valid, values, 0.0), valid.astype(values.dtype)], axis=1
  ).astype(jnp.float32)
  cut = functools.partial(resample, size=size)
  # Rows of the batch outside, views of a row inside.
  cut = jax.vmap(jax.vmap(cut, in_axes=(None, 0, 0)))(planes, box, flipped)
  total, weight = cut[:, :, 0], cut[:, :, 1]
  labelled = weight > 0.5
  return jnp.where(labelled, total / jnp.maximum(weight, 0.5), 0.0), labelled


def crop_boxes(
  boxes: Float[Array, "b m 4"],
  valid: Bool[Array, "b m"],
  box: Float[Array, "b count 4"],
  flipped: Bool[Array, "b count"],
  *,
  min_visible: float = 0.4,
  min_size: float = 1 / 56,
) -> tuple[Float[Array, "b count m 4"], Bool[Array, "b count m"]]:
  """Boxes in the coordinates of the views.

  Args:
    boxes: `(y0, x0, y1, x1)` in the canvas's unit square. What lies outside it
      is cut off first; NaN, infinite, inverted and empty boxes are dropped.
    valid: which boxes there are.
    box: the views' regions, `Made.box`.
    flipped: `Made.flipped`.
    min_visible: least share of a box's area that must lie in the view.
    min_size: least height and width of what is left, in the view's unit
      square; the default is 4 pixels of 224.

  Returns:
    The boxes cut to the view's unit square, zero where dropped, and which are
    left.
  """
  usable = valid & jnp.isfinite(boxes).all(-1)
  inside = jnp.clip(jnp.where(usable[..., None], boxes, 0.0), 0.0, 1.0)
  inside = inside[:, None]
  low, high = box[:, :, None, :2], box[:, :, None, 2:]
  visible_low = jnp.maximum(inside[..., :2], low)
  visible_high = jnp.minimum(inside[..., 2:], high)
  # An inverted box has a negative side; two of them must not make an area.
  area = jnp.maximum(inside[..., 2:] - inside[..., :2], 0.0).prod(-1)
  visible = jnp.maximum(visible_high - visible_low, 0.0).prod(-1)
  extent = high - low
  y0, x0 = jnp.moveaxis((visible_low - low) / extent, -1, 0)
  y1, x1 = jnp.moveaxis((visible_high - low) / extent, -1, 0)
  mirrored = flipped[:, :, None]
  x0, x1 = jnp.where(mirrored, 1 - x1, x0), jnp.where(mirrored, 1 - x0, x1)
  kept = usable[:, None] & (area > 0) & (visible >= min_visible * area)
  kept &= (y1 - y0 >= min_size) & (x1 - x0 >= min_size)
  cut = jnp.clip(jnp.stack([y0, x0, y1, x1], axis=-1), 0.0, 1.0)
  return jnp.where(kept[..., None], cut, 0.0), kept
