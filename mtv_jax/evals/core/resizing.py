"""Resizing of arrays with the interpolation of published evaluations.

Methods reproduce PyTorch's `interpolate`. A linear method is a matrix per axis:
on the host, only the few non-zero entries of each row are summed; on the
device, arrays are multiplied by the matrix, which suits accelerators.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, Shaped

from mtv_jax.augment import geometry
from mtv_jax.utils.errors import InputError, check_choice
from mtv_jax.utils.resampling import resize_matrix

LINEAR = ("bilinear", "bilinear_corners", "bilinear_antialiased", "bicubic")
LINEAR += ("bicubic_corners", "bicubic_antialiased")
NEAREST = ("nearest", "nearest_exact")
METHODS = (*LINEAR, *NEAREST)


@functools.lru_cache(maxsize=64)
def matrix(
  size: int, new_size: int, method: str = "bilinear"
) -> Float64[np.ndarray, "new old"]:
  """The matrix that resamples `size` values to `new_size`; rows sum to one.

  The methods are:
    bilinear: align_corners=False; two taps, however much the axis shrinks.
    bilinear_corners: align_corners=True.
    bilinear_antialiased: antialias=True; Pillow's BILINEAR.
    bicubic: a = -0.75, four taps; OpenCV's INTER_CUBIC.
    bicubic_corners: as bicubic, align_corners=True.
    bicubic_antialiased: a = -0.5; Pillow's BICUBIC, `jax.image.resize`.
  """
  check_choice("resizing method", method, LINEAR)
  if size < 1 or new_size < 1:
    raise InputError(f"resizing {size} values to {new_size}; expected >= 1")
  if method == "bilinear_corners":
    weights = resize_matrix(size, new_size, method)
    weights = np.array(weights.astype(np.float32), np.float64)
  elif method == "bilinear_antialiased":
    # Concrete even under tracing: it depends only on sizes.
    with jax.ensure_compile_time_eval():
      weights = np.array(_antialiased_weights(size, new_size), np.float64)
  else:
    kind = method.replace("bicubic_a", "a")
    weights = np.array(resize_matrix(size, new_size, kind))
  weights.setflags(write=False)  # cached, so shared by every caller
  return weights


@functools.partial(jax.jit, static_argnums=(0, 1))
def _antialiased_weights(size: int, new_size: int) -> Array:
  zero, one = jnp.float32(0), jnp.float32(1)
  return geometry.resample_matrix(zero, one, source=size, target=new_size)


@functools.lru_cache(maxsize=64)
def indices(
  size: int, new_size: int, method: str = "nearest"
) -> Int[np.ndarray, " new"]:
  """Index of the nearest of `size` values for each of `new_size`.

  `nearest` reads at the pixel's upper left corner (16 to 4 reads 0, 4, 8, 12:
  torch's 'nearest', OpenCV's INTER_NEAREST), `nearest_exact` at its centre (2,
  6, 10, 14: torch's 'nearest-exact', Pillow, JAX).
  """
  check_choice("resizing method", method, NEAREST)
  # In float32 as in PyTorch: rounding decides at integer positions.
  scale = np.float32(size) / np.float32(new_size)
  shift = np.float32(0.5 if method == "nearest_exact" else 0.0)
  position = np.floor((np.arange(new_size, dtype=np.float32) + shift) * scale)
  nearest = np.minimum(position.astype(np.int64), size - 1)
  nearest.setflags(write=False)
  return nearest


_Images = Shaped[Array, "*n h w d"] | Shaped[np.ndarray, "*n h w d"]
_Maps = Shaped[Array, "*n h w"] | Shaped[np.ndarray, "*n h w"]


def resize(x: _Images, size: tuple[int, int], *, method: str = "bilinear"):
  """Resizes `[*n, h, w, d]`, images or features, on the host or the device.

  The result has the dtype of `x`; linear methods turn integers into float32.
  """
  return _resize(x, size, method=method, axis=x.ndim - 3)


def resize_maps(x: _Maps, size: tuple[int, int], *, method: str = "bilinear"):
  """Resizes maps without channels (depth, labels); see `resize`."""
  return _resize(x, size, method=method, axis=x.ndim - 2)


def _resize(x, size, *, method, axis):
  check_choice("resizing method", method, METHODS)
  if method in LINEAR and not jnp.issubdtype(x.dtype, jnp.floating):
    x = x.astype(np.float32)
  for dim, new in ((axis, size[0]), (axis + 1, size[1])):
    old = x.shape[dim]
    if old == new:
      continue
    if method in NEAREST:
      x = x.take(indices(old, new, method), axis=dim)
    elif isinstance(x, np.ndarray):
      columns, values = _taps(old, new, method)
      shape = np.where(np.arange(x.ndim) == dim, -1, 1)
      values = values.astype(x.dtype)
      products = (
        x.take(column, axis=dim) * value.reshape(shape)
        for column, value in zip(columns, values, strict=True)
      )
      x = sum(products, 0)
    else:
      # A TPU multiplies float32 in bfloat16 by default.
      precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
      weights = jnp.asarray(matrix(old, new, method).T, x.dtype)
      moved = jnp.moveaxis(x, dim, -1)
      moved = jnp.matmul(moved, weights, precision=precision)
      x = jnp.moveaxis(moved, -1, dim)
  return x


@functools.lru_cache(maxsize=64)
def _taps(size: int, new_size: int, method: str) -> tuple:
  """Columns and values `[taps, new]` of each matrix row's non-zero entries."""
  weights = matrix(size, new_size, method)
  count = int((weights != 0).sum(axis=1).max())
  # Stable, so that taps are summed in axis order.
  order = np.argsort(weights == 0, axis=1, kind="stable")[:, :count]
  return order.T, np.take_along_axis(weights, order, axis=1).T
