"""Host-side preprocessing of the encoder's images."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from mtv_jax.config import options, sections
from mtv_jax.config.op_strings import parse_ops
from mtv_jax.config.options import NonNegativeInt, PositiveFloat, PositiveInt
from mtv_jax.data import canvas
from mtv_jax.models.two_tower import ModelConfig
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.resampling import resize_matrix

_OPTIONAL = {"crop_rounding": "down", "patch_size": None, "max_patches": None}
_OPTIONAL |= {"drop": 0, "rounding": "pillow"}  # Defaults of newer fields.
_OPENCV = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Resizes, crops, scales to 0..1 and normalises one image.

  With `antialias`, resizes uint8 as `rounding` says: bit-identical to the PIL
  or the torchvision image processors of `transformers`. Without it,
  interpolates four (bilinear) or sixteen (bicubic, a = -0.75) neighbours at any
  scale, as `tf.image.resize` does by default, and truncates like big_vision's
  cast to uint8.

  Attributes:
    size: side of the output square in pixels.
    resize: `squash` resizes to a square; `shortest` resizes the shorter side to
      `resize_size`, preserving the aspect ratio (longer side rounded down);
      `native` resizes to the largest size of at most `max_patches` patches,
      nearly preserving the aspect ratio (SigLIP 2 NaFlex).
    crop: `center` crops the central `size` x `size`; `none` needs `squash`.
    crop_rounding: rounding of half an odd margin: `down` as in transformers and
      big_vision, or `nearest` (half to even) as in torchvision.
    antialias: whether downsampling averages over all pixels.
    mean, std: per channel, in 0..1.
    resize_size: size before a smaller crop (DINOv2: 256, then 224); `size` if
      None.
    patch_size, max_patches: only for `native`.
    drop: pixels after the crop that don't fill a patch, dropped at the bottom
      and on the right (SigLIP So400m/14 encodes 378 of 384 pixels); not in
      `size`.
    rounding: how `antialias` computes: `pillow`, `torchvision` (16-bit weights)
      or `none` (float, as in DINOv3's processor).
  """

  size: PositiveInt
  resize: Literal["squash", "shortest", "native"] = "squash"
  crop: Literal["none", "center"] = "none"
  interpolation: Literal["bilinear", "bicubic"] = "bilinear"
  antialias: bool = True
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
  resize_size: int | None = None
  crop_rounding: Literal["down", "nearest"] = "down"
  patch_size: PositiveInt | None = None
  max_patches: PositiveInt | None = None
  drop: NonNegativeInt = 0
  rounding: Literal["pillow", "torchvision", "none"] = "pillow"

  def __post_init__(self):
    for name in ("mean", "std"):
      object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
    options.check_fields(self)
    is_native, has_crop = self.resize == "native", self.crop != "none"
    resize_size = self.resize_size or self.input_size
    sizes = f"resize_size={resize_size}, size={self.size}"
    for is_wrong, message in (
      (
        is_native and not (self.patch_size and self.max_patches),
        "resize='native' needs patch_size and max_patches",
      ),
      (is_native and has_crop, "resize='native' needs crop='none'"),
      (
        self.resize == "shortest" and not has_crop,
        "resize='shortest' yields images of different shapes, which can't be "
        "batched; add crop='center' or use resize='squash'",
      ),
      (
        not has_crop and resize_size != self.input_size,
        f"{sizes} needs crop='center'",
      ),
      (resize_size < self.input_size, f"{sizes} is smaller than the crop"),
    ):
      if is_wrong:
        raise ConfigError(message)

  @property
  def input_size(self) -> int:
    """Side of the square before `drop`, the `size` of an image processor."""
    return self.size + self.drop

  def __call__(
    self, image: UInt8[np.ndarray, "h w 3"] | PIL.Image.Image
  ) -> Float32[np.ndarray, "h2 w2 3"]:
    """Maps an image of any size to normalised float32 `[size, size, 3]`.

    With `native`, height and width are multiples of the patch size.
    """
    if isinstance(image, PIL.Image.Image):
      image = np.asarray(image.convert("RGB"))
    height = width = self.resize_size or self.input_size
    if self.resize == "native":
      height, width = native_shape(
        *image.shape[:2], patch_size=self.patch_size, limit=self.max_patches
      )
    if self.resize == "shortest":
      size, short = height, min(image.shape[:2])
      height, width = (int(size * side / short) for side in image.shape[:2])
    pixels = self._resize(image, height, width)
    if self.crop == "center":
      round_fn = {"down": math.floor, "nearest": round}[self.crop_rounding]
      top, left = (round_fn((s - self.input_size) / 2) for s in (height, width))
      pixels = pixels[top : top + self.size, left : left + self.size]
    if self.drop:
      pixels = pixels[: self.size, : self.size]
    return self.normalize(pixels)

  def _resize(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes to uint8, or to float32 in 0..255."""
    if not self.antialias:
      method = _OPENCV[self.interpolation]
      pixels = image.astype(np.float32)
      pixels = cv2.resize(pixels, (width, height), interpolation=method)
      # Add 1e-3 so that float error can't truncate a uniform 200 to 199.
      return np.floor(np.clip(pixels, 0, 255) + np.float32(1e-3))
    if self.rounding == "torchvision":
      pixels = _resize_rows(image.swapaxes(0, 1), width, self.interpolation)
      return _resize_rows(pixels.swapaxes(0, 1), height, self.interpolation)
    sides = width, height
    method = PIL.Image.Resampling[self.interpolation.upper()]
    if self.rounding == "pillow":
      return np.asarray(PIL.Image.fromarray(image).resize(sides, method))
    bands = map(PIL.Image.fromarray, np.moveaxis(np.float32(image), 2, 0))
    return np.stack([np.asarray(x.resize(sides, method)) for x in bands], 2)

  def normalize(
    self, pixels: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"]
  ) -> Float32[np.ndarray, "h w 3"]:
    """Scales and normalises pixels in 0..255, of any size."""
    # Order and dtypes make the result bit-identical to transformers.
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.float32(self.mean), np.float32(self.std)
    return (scaled - mean) / std

  def patches(
    self, image: UInt8[np.ndarray, "h w 3"] | PIL.Image.Image
  ) -> dict[str, np.ndarray]:
    """Patchifies one image for the `native` resize.

    `patches` are in row-major order, features ordered (y, x, channel),
    zero-padded to `[max_patches, F]`; `grids` is (rows, columns).
    """
    pixels, p = self(image), self.patch_size
    rows, columns = (side // p for side in pixels.shape[:2])
    patches = pixels.reshape(rows, p, columns, p, 3).swapaxes(1, 2)
    buffer = np.zeros((self.max_patches, 3 * p * p), np.float32)
    buffer[: rows * columns] = patches.reshape(rows * columns, -1)
    return {"patches": buffer, "grids": np.array((rows, columns), np.int32)}

  def squashed(self) -> Preprocess:
    """Returns a copy with neither `native` nor `drop`.

    For heads that need a full square; keeps a crop.
    """
    if self.drop and self.crop == "none":
      return dataclasses.replace(self, drop=0, resize_size=None)
    if self.resize != "native":
      return self
    return dataclasses.replace(
      self, resize="squash", patch_size=None, max_patches=None
    )

  def to_dict(self) -> dict[str, Any]:
    """The fields as a dictionary for JSON.

    Omits newer fields at their defaults, so that earlier versions can read it.
    """
    lists = {"mean": list(self.mean), "std": list(self.std)}
    fields = dataclasses.asdict(self) | lists
    return {
      k: v for k, v in fields.items() if k not in _OPTIONAL or v != _OPTIONAL[k]
    }

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Preprocess:
    """The inverse of `to_dict`; rejects unknown fields."""
    return options.build(cls, fields, where="Preprocess")


def _resize_rows(
  pixels: np.ndarray, rows: int, interpolation: str
) -> Float32[np.ndarray, "rows w 3"]:
  """Resizes the first axis of 0..255 like PyTorch's antialiased `interpolate`.

  For uint8 its weights have 16 bits, and the result is rounded.
  """
  methods = {"bilinear": "bilinear_antialiased", "bicubic": "antialiased"}
  matrix, bits = resize_matrix(len(pixels), rows, methods[interpolation]), 0
  # The most bits, up to 22, for which all weights fit in 16.
  while bits < 22 and int(matrix.max() * 2 ** (bits + 1) + 0.5) < 1 << 15:
    bits += 1
  matrix = np.copysign(np.floor(np.abs(matrix) * 2**bits + 0.5), matrix)
  flat = pixels.reshape(len(pixels), -1).astype(np.float64)
  spans = [np.flatnonzero(row)[[0, -1]] + (0, 1) for row in matrix]
  pairs = zip(matrix, spans, strict=True)
  sums = np.stack([row[a:b] @ flat[a:b] for row, (a, b) in pairs])
  resized = np.clip(np.floor(sums / 2**bits + 0.5), 0, 255)
  return resized.reshape(rows, *pixels.shape[1:]).astype(np.float32)


def native_shape(
  height: int, width: int, *, patch_size: int, limit: int
) -> tuple[int, int]:
  """Height and width of a resized image with at most `limit` patches.

  Scales both sides by one factor and rounds up to whole patches. Bisection
  finds the largest factor to within 1e-5, as in the image processor of
  `transformers`.
  """

  def count_patches(scale: float) -> list[int]:
    sides = (height, width)
    return [max(1, math.ceil(side * scale / patch_size)) for side in sides]

  low, high = 1e-6, 100.0
  while high - low >= 1e-5:
    middle = (low + high) / 2
    fits = math.prod(count_patches(middle)) <= limit
    low, high = (middle, high) if fits else (low, middle)
  rows, columns = count_patches(low)
  return rows * patch_size, columns * patch_size


def nearest_multiple(side: float, multiple: int, *, least: int = 0) -> int:
  """Rounds `side` to a multiple, upwards if the nearest is below `least`."""
  nearest = round(side / multiple)
  if nearest * multiple < least:
    nearest = math.ceil(side / multiple)
  return max(nearest, 1) * multiple


def lower_bound_shape(
  height: int, width: int, *, size: int, multiple: int
) -> tuple[int, int]:
  """Height and width at the image's aspect ratio, as in Depth Anything.

  The shorter side is at least `size`; both sides are multiples of `multiple`.
  """
  scale = max(size / height, size / width)
  rows, columns = (
    nearest_multiple(scale * side, multiple, least=size)
    for side in (height, width)
  )
  return rows, columns


def preprocess_from_config(
  model: ModelConfig, views: Mapping[str, Any]
) -> Preprocess:
  """Preprocessing of a run's encoder, from its config.

  `model.preprocess` sets all fields but mean and std, as `continue_from` reads
  them from a checkpoint. By default, images are squashed to a square with the
  size and interpolation of the view `image`, or else with the model's size and
  bilinear interpolation. Normalisation matches `views.py` on the device.
  """
  mean, std = model.pixels
  if fields := model.options.get("preprocess"):
    fields = {**fields, "mean": mean, "std": std}
    return options.build(Preprocess, fields, where="config.model.preprocess")
  size, interpolation = model.image_size, "bilinear"
  view = sections.to_dict(views).get("image")
  if view is not None:
    ops = view["ops"] if isinstance(view["ops"], str) else view["ops"][0]
    for op in parse_ops(ops):
      if op.name in ("resize", "crop"):
        size = op.args[0] if op.args else op.kwargs["size"]
        interpolation = op.kwargs.get("method", interpolation)
  return Preprocess(
    size=int(size), interpolation=interpolation, mean=mean, std=std
  )


def check_images(images: Any, method: str) -> None:
  """Raises TypeError or InputError unless `images` is a sequence of images."""
  is_single = isinstance(images, PIL.Image.Image | bytes | str | os.PathLike)
  is_single |= getattr(images, "ndim", 1) in (0, 2, 3)
  if is_single or not hasattr(images, "__len__"):
    fix = "[image]" if is_single else "list(images)"
    raise TypeError(
      f"Encoder.{method} takes a sequence of images, but got a"
      f" {type(images).__name__}: pass {fix}"
    )
  if not len(images):
    raise InputError(f"Encoder.{method} got no images")


def as_image(item: Any, key: str) -> Any:
  """Converts an image to uint8 `[H, W, 3]`, as in training.

  Reads paths and decodes bytes. Encoded and PIL images are rotated by their
  EXIF orientation, composited on white, and scaled from 16 bits. Arrays and
  PyTorch tensors must be RGB in uint8, or in uint16, which is scaled; tensors
  may have the channels first, as torchvision reads them.
  """
  if isinstance(item, str | os.PathLike):
    key, item = os.fspath(item), path_lib.read_bytes(path_lib.as_path(item))
  if isinstance(item, bytes):
    return canvas.decode(item, key=key)
  if isinstance(item, PIL.Image.Image):
    return canvas.from_pillow(item, key=key)
  if is_tensor := hasattr(item, "detach"):
    item = item.detach().cpu()
  array = np.asarray(item)
  if is_tensor and array.ndim == 3 and array.shape[0] == 3:
    array = np.ascontiguousarray(array.transpose(1, 2, 0))
  if not _is_rgb(array, np.uint8, np.uint16):
    raise TypeError(
      f"{key} must be a path, encoded bytes, a PIL image, or uint8 or uint16 "
      f"[H, W, 3]; got {type(item).__name__} {array.dtype} "
      f"{list(array.shape)}. The encoder itself resizes and normalises."
    )
  return array if array.dtype == np.uint8 else canvas.scale_16_bits(array)


def _is_rgb(item: Any, *dtypes: Any) -> bool:
  if not isinstance(item, np.ndarray) or item.dtype not in dtypes:
    return False
  return item.ndim == 3 and item.shape[-1] == 3 and item.size > 0


def as_pixels(item: Any, key: str, *, size: Sequence[int] = ()) -> np.ndarray:
  """Returns pixels to encode without a resize.

  They must be uint8 or float32 `[H, W, 3]`, of `size` if given.
  """
  if not _is_rgb(item, np.uint8, np.float32):
    description = [type(item).__name__]
    if isinstance(item, np.ndarray):
      description += [item.dtype, list(item.shape)]
    raise TypeError(
      f"{key} must be an array [H, W, 3], uint8 or float32 in 0..255; got "
      f"{' '.join(map(str, description))}. Encoder.image takes any image."
    )
  if size and item.shape[:2] != tuple(size):
    raise InputError(
      f"{key} is {item.shape[0]}x{item.shape[1]}, but the first one "
      f"{size[0]}x{size[1]}; Encoder.dense takes images of one size"
    )
  return item
