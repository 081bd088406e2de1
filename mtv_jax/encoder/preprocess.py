"""Preprocessing of the encoder's images, on the host."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8
from ml_collections import ConfigDict

from mtv_jax.config import options
from mtv_jax.config.op_strings import parse_ops
from mtv_jax.data import canvas
from mtv_jax.utils.errors import InputError, check_choice

_CHOICES = {
  "resize": ("squash", "shortest"),
  "crop": ("none", "center"),
  "interpolation": ("bilinear", "bicubic"),
}
_PILLOW = {
  "bilinear": PIL.Image.Resampling.BILINEAR,
  "bicubic": PIL.Image.Resampling.BICUBIC,
}
_OPENCV = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Resize, crop, scale to 0..1 and normalise one image.

  With `antialias` the resize is Pillow's on uint8, bit-identical to the PIL
  image processors of `transformers`. Without it, four (bilinear) or sixteen
  (bicubic, a = -0.75) neighbours are interpolated in float at any scale: the
  default of `tf.image.resize` and torch, used by big_vision on ImageNet.

  Attributes:
    size: side of the resulting square in pixels.
    resize: `squash` resizes to a square, `shortest` resizes the shorter side to
      `resize_size` at constant aspect ratio (the longer side is rounded down).
    crop: `center` takes the middle `size` x `size`; `none` needs `squash`.
    interpolation: `bilinear` or `bicubic`.
    antialias: whether shrinking averages over all pixels.
    mean: of the three channels, in 0..1.
    std: of the three channels, in 0..1.
    resize_size: the size before a smaller crop (DINOv2: 256, then 224); `size`
      if None.
  """

  size: int
  resize: str = "squash"
  crop: str = "none"
  interpolation: str = "bilinear"
  antialias: bool = True
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  resize_size: int | None = None

  def __post_init__(self):
    for field, choices in _CHOICES.items():
      check_choice(f"Preprocess: {field}", getattr(self, field), choices)
    if self.size < 1:
      raise InputError(f"Preprocess: size={self.size}; expected at least 1")
    if self.resize == "shortest" and self.crop == "none":
      raise InputError(
        "Preprocess: resize='shortest' gives images of different shapes, which "
        "can't be batched; add crop='center' or use resize='squash'"
      )
    resized = self.resize_size or self.size
    if self.crop == "none" and resized != self.size:
      raise InputError(
        f"Preprocess: resize_size={resized} with size={self.size} needs "
        "crop='center'"
      )
    if resized < self.size:
      raise InputError(
        f"Preprocess: resize_size={resized} is smaller than the crop's "
        f"size={self.size}"
      )
    for field in ("mean", "std"):
      value = tuple(float(v) for v in getattr(self, field))
      if len(value) != 3:
        raise InputError(
          f"Preprocess: {field}={value}; expected three numbers, one a channel"
        )
      object.__setattr__(self, field, value)

  def __call__(
    self, image: UInt8[np.ndarray, "h w 3"] | PIL.Image.Image
  ) -> Float32[np.ndarray, "s s 3"]:
    """One image of any size to float32 `[size, size, 3]`, normalised."""
    if isinstance(image, PIL.Image.Image):
      image = np.asarray(image.convert("RGB"))
    return self.normalize(self._crop(self._resize(image)))

  def normalize(
    self, pixels: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"]
  ) -> Float32[np.ndarray, "h w 3"]:
    """Pixels in 0..255, of any size, scaled and normalised; no resizing."""
    # This order and these dtypes are bit-identical to transformers.
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.float32(self.mean), np.float32(self.std)
    return (scaled - mean) / std

  def _resize(self, image: np.ndarray) -> np.ndarray:
    height, width = self._resized(*image.shape[:2])
    if self.antialias:
      method = _PILLOW[self.interpolation]
      resized = PIL.Image.fromarray(image).resize((width, height), method)
      return np.asarray(resized)
    method = _OPENCV[self.interpolation]
    pixels = image.astype(np.float32)
    return cv2.resize(pixels, (width, height), interpolation=method)

  def _resized(self, height: int, width: int) -> tuple[int, int]:
    size = self.resize_size or self.size
    if self.resize == "squash":
      return size, size
    if height <= width:
      return size, int(size * width / height)
    return int(size * height / width), size

  def _crop(self, image: np.ndarray) -> np.ndarray:
    if self.crop == "none":
      return image
    top = (image.shape[0] - self.size) // 2
    left = (image.shape[1] - self.size) // 2
    return image[top : top + self.size, left : left + self.size]

  def to_dict(self) -> dict[str, Any]:
    """The fields as a dictionary for JSON."""
    fields = dataclasses.asdict(self)
    return {
      k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()
    }

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Preprocess:
    """The inverse of `to_dict`; an unknown field is an error."""
    return options.build(cls, fields, where="Preprocess")


def preprocess_of(config: Mapping[str, Any] | ConfigDict) -> Preprocess:
  """Preprocessing of a run's encoder, from its config.

  The image squashed to a square and normalised to -1..1, as `views.py` does on
  the device, of the size of the view `image` or else of the model.

  Args:
    config: with `model.image_size` and `views`.
  """
  size = config["model"]["image_size"]
  view = config.get("views", {}).get("image")
  if view is not None:
    ops = view["ops"] if isinstance(view["ops"], str) else view["ops"][0]
    for op in parse_ops(ops):
      if op.name in ("resize", "crop"):
        size = op.args[0] if op.args else op.kwargs["size"]
  return Preprocess(size=int(size))


def as_image(item: Any, key: str) -> Any:
  """Pixels of an image as training sees them: uint8 `[H, W, 3]`.

  Encoded bytes are decoded. These and Pillow's images are rotated by their
  EXIF orientation, set on white, and scaled from 16 bits. Arrays have to be
  uint8 RGB.
  """
  if isinstance(item, bytes):
    return canvas.decode(item, key=key)
  if isinstance(item, PIL.Image.Image):
    return canvas.from_pillow(item, key=key)
  if isinstance(item, str | os.PathLike):
    raise TypeError(
      f"{key} is the path {os.fspath(item)!r}: pass what it holds, such as "
      "pathlib.Path(path).read_bytes()"
    )
  array = np.asarray(item)
  kind = array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3
  if not kind or not array.size:
    raise TypeError(
      f"{key} must be uint8 [H, W, 3], PIL or encoded bytes; got "
      f"{type(item).__name__} {array.dtype} {list(array.shape)}. Pass pixels "
      "as they were decoded: the encoder resizes and normalises."
    )
  return array


def as_pixels(
  item: Any, key: str, *, size: Sequence[int] | None = None
) -> np.ndarray:
  """Pixels to encode without a resize, of `size` if that is given.

  Raises:
    TypeError: for what is neither uint8 nor float32 `[H, W, 3]`.
    InputError: for another size than that of the other images.
  """
  array = item if isinstance(item, np.ndarray) else None
  if (
    array is None
    or array.dtype not in (np.uint8, np.float32)
    or array.ndim != 3
    or array.shape[-1] != 3
    or not array.size
  ):
    got = type(item).__name__
    if array is not None:
      got += f" {array.dtype} {list(array.shape)}"
    raise TypeError(
      f"{key} must be an array [H, W, 3], uint8 or float32 in 0..255; got "
      f"{got}. Encoder.dense resizes nothing; Encoder.image takes any image."
    )
  if size is not None and array.shape[:2] != tuple(size):
    raise InputError(
      f"{key} is {array.shape[0]}x{array.shape[1]} and the first one "
      f"{size[0]}x{size[1]}; Encoder.dense takes images of one size: resize, "
      "or call it once a size"
    )
  return array
