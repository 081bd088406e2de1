"""Photometric augmentations on the three channels of one image in [0, 1].

Each has a function of an image and traced factors, equal to torchvision's on
float tensors, and an op that samples the factors. Defaults are
DINOv2's.

Arithmetic is float32: hue divides by small channel differences, and vector
units compute in float32 anyway. Only the blur's products use the compute dtype.

An image is a tuple of channels: on a TPU, splitting an array into channels ends
a fusion. By the compiler's estimate for v5e, jitter on `[3, h, w]` arrays takes
three times as long.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.augment import geometry
from mtv_jax.augment.op import ViewOp, check_ascending
from mtv_jax.augment.random import bernoulli, ranks, uniform
from mtv_jax.config import options
from mtv_jax.config.options import Fraction, NonNegativeFloat, Range
from mtv_jax.utils.errors import ConfigError

# ITU-R 601 luma, with torchvision's rounding.
LUMA = (0.2989, 0.587, 0.114)

# A Gaussian of this sigma, in pixels, is the identity.
IDENTITY_SIGMA = 1e-3

Planes = tuple[Float[Array, "h w"], Float[Array, "h w"], Float[Array, "h w"]]


def luma(image: Planes) -> Float[Array, "h w"]:
  """Luma of each pixel."""
  return sum(w * channel for w, channel in zip(LUMA, image, strict=True))


def blend(
  image: Planes, other: Float[Array, "#h #w"], factor: Float[Array, ""]
) -> Planes:
  """`factor * image + (1 - factor) * other`, clipped to [0, 1]."""
  other = (1.0 - factor) * other
  return tuple(jnp.clip(factor * x + other, 0.0, 1.0) for x in image)


def select(which: Bool[Array, ""], image: Planes, other: Planes) -> Planes:
  """`image` if `which`, else `other`."""
  pairs = zip(image, other, strict=True)
  return tuple(jnp.where(which, x, y) for x, y in pairs)


def shift_hue(image: Planes, shift: Float[Array, ""]) -> Planes:
  """Rotates the hue by `shift` of a full circle, as in HSV.

  Value and chroma don't change, so a channel is `max - chroma * t`, with `t` a
  trapezium in the distance between the hue and the channel's peak.
  """
  red, green, blue = image
  top = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = top - jnp.minimum(jnp.minimum(red, green), blue)
  scale = 1.0 / jnp.where(chroma > 0, chroma, 1.0)
  # In sixths of a circle; arbitrary for grey, whose chroma is 0.
  hue = 4.0 + (red - green) * scale
  hue = jnp.where(top == green, 2.0 + (blue - red) * scale, hue)
  hue = jnp.where(top == red, (green - blue) * scale, hue) + 6.0 * shift

  def channel(peak):
    distance = jnp.mod(hue + peak, 6.0)
    t = jnp.clip(jnp.minimum(distance, 4.0 - distance), 0.0, 1.0)
    return top - chroma * t

  return channel(5.0), channel(3.0), channel(1.0)


def jitter_colour(
  image: Planes,
  *,
  brightness: Float[Array, ""],
  contrast: Float[Array, ""],
  saturation: Float[Array, ""],
  hue: Float[Array, ""],
  positions: Int[Array, "4"],
) -> Planes:
  """Applies the four adjustments of torchvision's ColorJitter in sequence.

  Brightness, contrast and saturation are factors, hue a shift in turns.
  `positions` are the adjustments' positions in the sequence, in the order of
  the arguments.
  """
  # The order is traced, so every step computes all four. Three are a blend:
  # with black, with the mean of luma, or with luma.
  at_brightness, at_contrast, at_saturation, at_hue = positions
  for step in range(4):
    grey = luma(image)  # [h, w]
    factor = jnp.where(step == at_brightness, brightness, 1.0)
    factor = jnp.where(step == at_contrast, contrast, factor)
    factor = jnp.where(step == at_saturation, saturation, factor)
    other = jnp.where(step == at_contrast, grey.mean(), 0.0)
    other = jnp.where(step == at_saturation, grey, other)
    shifted, blended = shift_hue(image, hue), blend(image, other, factor)
    image = select(step == at_hue, shifted, blended)
  return image


def gaussian_blur(
  image: Planes, sigma: Float[Array, ""], kernel: int, dtype: Any = jnp.float32
) -> Planes:
  """Gaussian blur with `kernel` taps along both axes and mirrored borders.

  Two products with a banded matrix: 2 x 2 x 3 x s^3 FLOPs for images of side
  `s`, which a TPU's matrix unit computes faster than it could read `kernel`
  shifted copies from memory.

  `sigma` is in pixels, `kernel` odd and at most `2 s - 1`; `dtype` is the
  products' dtype.
  """
  size = image[0].shape[0]
  radius = kernel // 2
  row, column = jnp.arange(size)[:, None], jnp.arange(size)[None, :]

  def taps(distance, is_mirrored=True):
    value = jnp.exp(-0.5 * (distance / sigma) ** 2)
    return jnp.where(is_mirrored & (jnp.abs(distance) <= radius), value, 0.0)

  # Mirrored at 0 and at size - 1 without repeating the border pixel.
  band = taps(row - column)  # [size, size]
  band += taps(row + column, column > 0)
  band += taps(2 * (size - 1) - column - row, column < size - 1)
  band /= band.sum(axis=1, keepdims=True)
  # Centred: bfloat16 is finest around zero. Rows sum to one.
  centred = (jnp.stack(image) - 0.5).astype(dtype)  # [3, size, size]
  blurred = geometry.separable_product(band, centred, band) + 0.5
  return blurred[0], blurred[1], blurred[2]


def solarize(image: Planes, threshold: float | int) -> Planes:
  """Inverts values of at least `threshold`, given in 0..255."""
  return tuple(jnp.where(x >= threshold / 255.0, 1.0 - x, x) for x in image)


@dataclasses.dataclass(frozen=True)
class PhotometricOp(ViewOp):
  """Base class of ops on pixel values."""

  stage = "photometrics"
  p: Fraction = 0.0  # Probability; ops override the default.

  def __call__(
    self, image: Planes, u: Float[Array, " uniforms"], dtype: Any
  ) -> Planes:
    """Augments the image with probability `p`.

    The image is float32 in [0, 1]; `dtype` applies to matrix products.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Jitter(PhotometricOp, name="jitter"):
  """`jitter(p)`: ColorJitter in a random order, with probability `p`.

  The brightness factor is uniform from `1 - brightness` (at least 0) to `1 +
  brightness`; contrast and saturation likewise. The hue shift is uniform from
  `-hue` to `hue` turns.
  """

  p: Fraction = 0.8
  brightness: NonNegativeFloat = 0.4
  contrast: NonNegativeFloat = 0.4
  saturation: NonNegativeFloat = 0.2
  hue: Annotated[float, Range(min=0, max=0.5)] = 0.1

  uniforms = 9

  def sample_factors(self, u: Float[Array, "9"]) -> dict[str, Array]:
    """Samples arguments of `jitter_colour`, neutral with probability 1 - p."""
    # Neutral factors instead of a select, so that the unchanged image does not
    # occupy memory until the end.
    is_active = bernoulli(u[0], self.p)

    def sample_factor(u, spread):
      value = uniform(u, max(0.0, 1.0 - spread), 1.0 + spread)
      return jnp.where(is_active, value, 1.0)

    shift = uniform(u[4], -self.hue, self.hue)
    return {
      "brightness": sample_factor(u[1], self.brightness),
      "contrast": sample_factor(u[2], self.contrast),
      "saturation": sample_factor(u[3], self.saturation),
      "hue": jnp.where(is_active, shift, 0.0),
      "positions": ranks(u[5:]),
    }

  def __call__(self, image: Planes, u: Float[Array, "9"], dtype: Any) -> Planes:
    del dtype
    return jitter_colour(image, **self.sample_factors(u))


@dataclasses.dataclass(frozen=True)
class Grey(PhotometricOp, name="grey"):
  """`grey(p)`: sets all channels to luma, with probability `p`."""

  p: Fraction = 0.2
  uniforms = 1

  def __call__(self, image: Planes, u: Float[Array, "1"], dtype: Any) -> Planes:
    del dtype
    return select(bernoulli(u[0], self.p), (luma(image),) * 3, image)


@dataclasses.dataclass(frozen=True)
class Blur(PhotometricOp, name="blur"):
  """`blur(p)`: Gaussian blur of random sigma, with probability `p`.

  DINOv2 and DINOv3 trained without blur on the first global crop, with
  probability 0.9 on the second and 0.5 on local crops. Their code requests 1.0,
  0.1 and 0.5 (as in DINO and the papers), but applies 1 - p; a maintainer
  confirms it (dinov3 issue 286).
  """

  p: Fraction = 0.5
  sigma: tuple[options.PositiveFloat, options.PositiveFloat] = (
    0.1,
    2.0,
  )  # Range, in pixels.
  kernel: Annotated[int, Range(min=3)] = 9  # Taps per side, odd.

  def __post_init__(self):
    check_ascending("sigma", *self.sigma)
    if self.kernel % 2 == 0:
      raise ConfigError(f"kernel is {self.kernel}, expected an odd number.")

  def check(self, size: int) -> None:
    if self.kernel // 2 >= size:
      raise ConfigError(
        f"blur: {self.kernel} taps are too many; at most {2 * size - 1}."
      )

  uniforms = 2

  def __call__(self, image: Planes, u: Float[Array, "2"], dtype: Any) -> Planes:
    sigma = uniform(u[1], *self.sigma)
    # An identity Gaussian is cheaper than a select between images.
    sigma = jnp.where(bernoulli(u[0], self.p), sigma, IDENTITY_SIGMA)
    return gaussian_blur(image, sigma, kernel=self.kernel, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Solarize(PhotometricOp, name="solarize"):
  """`solarize(p)`: inverts values >= `threshold` with probability `p`.

  DINOv2 solarises only its second global crop.
  """

  p: Fraction = 0.2
  threshold: Annotated[float, Range(min=0, max=255)] = 128.0
  uniforms = 1

  def __call__(self, image: Planes, u: Float[Array, "1"], dtype: Any) -> Planes:
    del dtype
    inverted = solarize(image, self.threshold)
    return select(bernoulli(u[0], self.p), inverted, image)
