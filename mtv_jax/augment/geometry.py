"""Geometry of a view: crops, flips and resampling of images and labels.

A box is `(y0, x0, y1, x1)` in the unit square of the canvas, which is the whole
image squashed to a square. A view's pixels, dense maps and boxes are computed
from one box and one bit (flipped), so that they are aligned.

Resampling is two small matrix products: rows, then columns. The weights equal
Pillow's `resize(size, method, box=...)`: the kernel stretches to an output
pixel when downsampling, and may extend past the box into the canvas
(torchvision crops first, which truncates the kernel at the border).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt16

from mtv_jax.augment.op import ViewOp, check_ascending
from mtv_jax.augment.random import bernoulli, uniform
from mtv_jax.config import options
from mtv_jax.config.options import PositiveFloat, PositiveFraction

# Kernels: a triangle, or Keys' cubic convolution (1981) with a = -0.5, as in
# Pillow. torchvision defaults to bilinear; DINOv2 and MAE crop bicubic.
Interpolation = Literal["bilinear", "bicubic"]

# Candidate boxes per crop, as many as torchvision's RandomResizedCrop tries.
CANDIDATES = 10


@dataclasses.dataclass(frozen=True)
class BoxOp(ViewOp):
  """Base class of ops that sample a view's box; a view has exactly one."""

  stage = "geometry"
  size: options.Side

  def box(
    self, image_size: Int[Array, "2"], u: Float[Array, " uniforms"]
  ) -> Float[Array, "4"]:
    """Samples a view's box on the canvas, for an image's height and width."""
    raise NotImplementedError(f"{type(self).__name__} lacks box()")

  # Resampling kernel. Not annotated: as a field it would precede the ops' own.
  method = "bilinear"


@dataclasses.dataclass(frozen=True)
class Resize(BoxOp, name="resize"):
  """`resize(S, method)`: the whole canvas, `S` x `S` pixels."""

  method: Interpolation = "bilinear"
  uniforms = 0

  def box(self, image_size, u) -> Float[Array, "4"]:
    del image_size, u
    return jnp.array([0.0, 0.0, 1.0, 1.0])


@dataclasses.dataclass(frozen=True)
class Crop(BoxOp, name="crop"):
  """`crop(S, min_area, max_area, ratio, method)`: a random crop, `S` x `S`.

  Area and aspect ratio have the distribution of torchvision's
  RandomResizedCrop, in the geometry of the original image, not of the squashed
  canvas. The default area matches DINOv2's global crops; its local crops are
  `crop(96, 0.05, 0.32)`.
  """

  min_area: PositiveFraction = 0.32  # As a fraction of the image's area.
  max_area: PositiveFraction = 1.0
  # Range of width / height, sampled log-uniformly.
  ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
  method: Interpolation = "bilinear"

  def __post_init__(self):
    check_ascending("areas", self.min_area, self.max_area)
    check_ascending("ratio", *self.ratio)

  uniforms = 2 * CANDIDATES + 2

  def box(self, image_size, u) -> Float[Array, "4"]:
    height_width = jnp.maximum(image_size, 1).astype(jnp.float32)
    aspect = height_width[1] / height_width[0]  # Width over height.
    low, high = (math.log(r) for r in self.ratio)
    area = uniform(u[:CANDIDATES], self.min_area, self.max_area)
    ratio = jnp.exp(uniform(u[CANDIDATES : 2 * CANDIDATES], low, high))
    heights = jnp.sqrt(area / ratio * aspect)  # [CANDIDATES]
    widths = jnp.sqrt(area * ratio / aspect)
    fits = (heights <= 1.0) & (widths <= 1.0)
    index = jnp.argmax(fits)
    # If none fits: the largest centred box of an allowed ratio.
    nearest = jnp.clip(aspect, *self.ratio)
    extent = jnp.where(
      fits.any(),
      jnp.stack([heights[index], widths[index]]),
      jnp.minimum(1.0, jnp.stack([aspect / nearest, nearest / aspect])),
    )
    corner = jnp.where(fits.any(), u[-2:], 0.5) * (1.0 - extent)
    return jnp.concatenate([corner, jnp.minimum(corner + extent, 1.0)])


@dataclasses.dataclass(frozen=True)
class Flip(ViewOp, name="flip"):
  """`flip(p)`: mirrors horizontally with probability `p`."""

  stage = "geometry"
  p: options.Fraction = 0.5
  uniforms = 1

  def sample_flip(self, u: Float[Array, "1"]) -> Bool[Array, ""]:
    """Samples whether this view is mirrored."""
    return bernoulli(u[0], self.p)


def resample_matrix(
  start: Float[Array, ""],
  stop: Float[Array, ""],
  *,
  source: int,
  target: int,
  method: str = "bilinear",
) -> Float[Array, "target source"]:
  """Antialiased resampling of one axis, as a matrix.

  Output pixels span `start` to `stop` in the unit interval; `stop < start`
  mirrors the axis. Float32 rows sum to one, for any interval, however small.
  """
  step = (stop - start) / target
  centres = start + (jnp.arange(target) + 0.5) * step  # [target]
  pixels = (jnp.arange(source) + 0.5) / source  # [source]
  # In source pixels; at least one.
  radius = jnp.maximum(jnp.abs(step) * source, 1.0)
  distance = jnp.abs(centres[:, None] - pixels[None, :]) * source
  if method == "bicubic":
    x = distance / radius
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
    weights = jnp.where(x <= 1.0, near, jnp.where(x < 2.0, far, 0.0))
  else:
    weights = jnp.maximum(1.0 - distance / radius, 0.0)
  return weights / weights.sum(axis=1, keepdims=True)


def separable_product(
  left: Float[Array, "y h"],
  planes: Float[Array, "c h w"],
  right: Float[Array, "x w"],
) -> Float[Array, "c y x"]:
  """Float32 `left @ planes @ right.T`, with products in `planes.dtype`."""
  dtype = planes.dtype
  # A TPU multiplies float32 in bfloat16 by default.
  precision = "highest" if dtype == jnp.float32 else None
  options = dict(precision=precision, preferred_element_type=jnp.float32)
  product = functools.partial(jnp.einsum, **options)
  rows = product("yh,chw->cyw", left.astype(dtype), planes)
  return product("xw,cyw->cyx", right.astype(dtype), rows.astype(dtype))


def resample(
  planes: Float[Array, "c h w"],
  box: Float[Array, "4"],
  flipped: Bool[Array, ""],
  *,
  size: int,
  method: str = "bilinear",
) -> Float[Array, "c {size} {size}"]:
  """Resamples the box of `planes` to `size` x `size` pixels, antialiased.

  The products run in the dtype of `planes`; weights and result are float32.
  """
  y0, x0, y1, x1 = box
  # Swapping the ends mirrors the columns at no cost.
  left = jnp.where(flipped, x1, x0)
  right = jnp.where(flipped, x0, x1)
  height, width = planes.shape[1:]
  matrix = functools.partial(resample_matrix, target=size, method=method)
  rows, columns = (
    matrix(y0, y1, source=height),
    matrix(left, right, source=width),
  )
  return separable_product(rows, planes, columns)


def _resample_crops(planes: Array, box: Array, flipped: Array, size: int):
  """Resamples each row's planes `[b, c, h, w]` to each of its crops."""
  crops = jax.vmap(functools.partial(resample, size=size), in_axes=(None, 0, 0))
  return jax.vmap(crops)(planes, box, flipped)  # [b, count, c, y, x]


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
  """Crops and flips dense label maps like the views.

  Masked values and the mask are resampled with equal weights and divided, so
  that a pixel is the mean of the labelled pixels under it. Map, canvas and view
  may differ in size. NaN and infinity count as missing labels. Returns the
  maps, zero where invalid, and a mask of valid pixels, which have more than
  half of their weight on labels. `box` and `flipped`: see `ViewBatch`.
  """
  valid = valid & jnp.isfinite(values)
  planes = [jnp.where(valid, values, 0.0), valid.astype(values.dtype)]
  planes = jnp.stack(planes, axis=1).astype(jnp.float32)
  crops = _resample_crops(planes, box, flipped, size)
  total, weight = crops[:, :, 0], crops[:, :, 1]  # [b, count, size, size]
  is_valid = weight > 0.5
  return jnp.where(is_valid, total / jnp.maximum(weight, 0.5), 0.0), is_valid


def crop_features(
  features: Float[Array, "b p d"],
  box: Float[Array, "b count 4"],
  flipped: Bool[Array, "b count"],
  *,
  size: int,
) -> Float[Array, "b count {size}*{size} d"]:
  """Crops and flips patch features of the canvas like the views.

  Features lie on a square grid, row by row, and are resampled like pixels.
  """
  b, patches, channels = features.shape
  grid = round(patches**0.5)
  planes = jnp.moveaxis(features.reshape(b, grid, grid, channels), -1, 1)
  # [b, count, d, y, x] -> [b, count, y x, d]
  crops = jnp.moveaxis(_resample_crops(planes, box, flipped, size), 2, -1)
  return crops.reshape(b, box.shape[1], size * size, channels)


def crop_boxes(
  boxes: Float[Array, "b m 4"],
  valid: Bool[Array, "b m"],
  box: Float[Array, "b count 4"],
  flipped: Bool[Array, "b count"],
  *,
  min_visible: float = 0.4,
  min_size: float = 1 / 56,
) -> tuple[Float[Array, "b count m 4"], Bool[Array, "b count m"]]:
  """Transforms boxes to the coordinates of the views (`box`, `flipped`).

  Boxes `(y0, x0, y1, x1)` are clipped to the canvas's unit square; NaN,
  infinite, inverted and empty boxes are dropped, as are boxes with less than
  `min_visible` of their area inside the view, or whose visible sides are below
  `min_size` in the view's unit square (4 pixels of 224). Returns the
  boxes, clipped to the view's unit square and zero where dropped, and a mask.
  """
  is_usable = valid & jnp.isfinite(boxes).all(-1)  # [b, m]
  clipped = jnp.clip(jnp.where(is_usable[..., None], boxes, 0.0), 0.0, 1.0)
  clipped = clipped[:, None]
  low, high = box[:, :, None, :2], box[:, :, None, 2:]  # [b, count, 1, 2]
  visible_low = jnp.maximum(clipped[..., :2], low)
  visible_high = jnp.minimum(clipped[..., 2:], high)
  # Clipped: two negative sides of an inverted box would have a positive area.
  area = jnp.maximum(clipped[..., 2:] - clipped[..., :2], 0.0).prod(-1)
  visible_area = jnp.maximum(visible_high - visible_low, 0.0).prod(-1)
  extent = high - low
  y0, x0 = jnp.moveaxis((visible_low - low) / extent, -1, 0)
  y1, x1 = jnp.moveaxis((visible_high - low) / extent, -1, 0)
  mirrored = flipped[:, :, None]
  x0, x1 = jnp.where(mirrored, 1 - x1, x0), jnp.where(mirrored, 1 - x0, x1)
  valid = is_usable[:, None] & (area > 0) & (visible_area >= min_visible * area)
  valid &= (y1 - y0 >= min_size) & (x1 - x0 >= min_size)  # [b, count, m]
  cropped = jnp.clip(jnp.stack([y0, x0, y1, x1], axis=-1), 0.0, 1.0)
  return jnp.where(valid[..., None], cropped, 0.0), valid


def choose_boxes(
  boxes: Float[Array, "b m 4"],
  valid: Bool[Array, "b m"],
  view: Any,
  count: int,
  *,
  score: Float[Array, "b m"] | None = None,
  min_visible: float = 0.4,
  min_size: float = 1 / 56,
) -> tuple[Int[Array, "b k"], Float[Array, "b k 4"], Bool[Array, "b k"]]:
  """Chooses at most `count` boxes in the first crop of each image.

  Visible boxes come first, ordered by score; without scores, in the order of
  `boxes`. Returns indices for `take_boxes`, the boxes in the crop of the `view`
  (a `views.ViewBatch`), and the visible mask; see `crop_boxes`.
  """
  crop = view.box[:, :1], view.flipped[:, :1]
  limits = dict(min_visible=min_visible, min_size=min_size)
  boxes, visible = crop_boxes(boxes, valid, *crop, **limits)
  score = 0.0 if score is None else jnp.nan_to_num(score)
  sort_key = jnp.where(visible[:, 0], score, -jnp.inf)  # [b, m]
  # Stable: ties preserve the order. Not top_k, for which XLA gathers the rows
  # of all devices.
  index = jnp.argsort(-sort_key, axis=1, stable=True)[:, :count]  # [b, k]
  return index, take_boxes(boxes[:, 0], index), take_boxes(visible[:, 0], index)


def take_boxes(
  values: Shaped[Array, "b m *rest"], index: Int[Array, "b k"]
) -> Shaped[Array, "b k *rest"]:
  """Gathers the values of chosen boxes, see `choose_boxes`."""
  index = index.reshape(*index.shape, *[1] * (values.ndim - 2))
  return jnp.take_along_axis(values, index, axis=1)


def crop_depth(
  depth: UInt16[Array, "b d d"], view: Any, size: int
) -> tuple[Float[Array, "m h w"], Bool[Array, "m h w"]]:
  """Crops depth labels for all crops of a view (`views.ViewBatch`).

  `depth` is inverse depth, 1 to 65535; 0 means unlabelled. Returns maps in
  [0, 1] and their masks, `[b * count, size, size]`.
  """
  values = (depth.astype(jnp.float32) - 1.0) / 65534.0
  maps = crop_maps(values, depth > 0, view.box, view.flipped, size=size)
  return tuple(x.reshape(-1, size, size) for x in maps)
