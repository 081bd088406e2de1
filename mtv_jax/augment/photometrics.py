"""Changes of colour, on the three channels of one image in [0, 1].

Everything is a plain function of an image and traced factors, equal to
torchvision's functional forms on float tensors, and an op that draws the
factors. Defaults are DINOv2's.

The arithmetic is float32 whatever the compute dtype: hue divides by small
differences of channels, and the chips' vector units compute in float32 anyway.
Only the blur's products run in the compute dtype.

An image is a tuple of channels, since on a TPU cutting an array into channels
and stacking them again ends a fusion: jitter on `[3, h, w]` arrays took three
times as long by the compiler's own estimate for v5e.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.augment import geometry
from mtv_jax.augment import random as draws
from mtv_jax.utils.errors import ConfigError

# ITU-R 601 luma, rounded as torchvision rounds it.
LUMA = (0.2989, 0.587, 0.114)

# A gaussian of so many pixels leaves everything where it is.
SHARP = 1e-3

Image = tuple[Float[Array, "h w"], Float[Array, "h w"], Float[Array, "h w"]]


def luma(image: Image) -> Float[Array, "h w"]:
  """Brightness of each pixel as it is perceived."""
  return sum(
    weight * channel for weight, channel in zip(LUMA, image, strict=True)
  )


def blend(
  image: Image, other: Float[Array, "#h #w"], factor: Float[Array, ""]
) -> Image:
  """`factor * image + (1 - factor) * other`, cut to [0, 1].

  Brightness blends with black, contrast with the mean luma, saturation with
  the luma of each pixel.
  """
  other = (1.0 - factor) * other
  return tuple(jnp.clip(factor * x + other, 0.0, 1.0) for x in image)


def choose(which: Bool[Array, ""], image: Image, other: Image) -> Image:
  """`image` where `which`, else `other`."""
  return tuple(
    jnp.where(which, x, y) for x, y in zip(image, other, strict=True)
  )


def shift_hue(image: Image, shift: Float[Array, ""]) -> Image:
  """Turns the hue by `shift` of a full circle, as through HSV and back.

  Value and chroma stay, so that the way back needs no saturation: a channel
  is `max - chroma * t`, with `t` a trapezium of its distance on the circle
  from where that channel peaks.
  """
  red, green, blue = image
  top = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = top - jnp.minimum(jnp.minimum(red, green), blue)
  scale = 1.0 / jnp.where(chroma > 0, chroma, 1.0)
  # In sixths of a circle; grey has none, and none is needed.
  hue = jnp.where(
    top == red,
    (green - blue) * scale,
    jnp.where(
      top == green, 2.0 + (blue - red) * scale, 4.0 + (red - green) * scale
    ),
  )
  hue = hue + 6.0 * shift

  def channel(peak):
    place = jnp.mod(hue + peak, 6.0)
    away = jnp.clip(jnp.minimum(place, 4.0 - place), 0.0, 1.0)
    return top - chroma * away

  return channel(5.0), channel(3.0), channel(1.0)


def jitter_colour(
  image: Image,
  *,
  brightness: Float[Array, ""],
  contrast: Float[Array, ""],
  saturation: Float[Array, ""],
  hue: Float[Array, ""],
  rank: Int[Array, "4"],
) -> Image:
  """The four changes one after the other, as torchvision's ColorJitter.

  Args:
    image: in [0, 1].
    brightness: factor; 1 changes nothing.
    contrast: likewise.
    saturation: likewise.
    hue: shift in turns; 0 changes nothing.
    rank: when each is done, a permutation of 0 to 3 in the order of the four
      arguments above.
  """

  # The order is traced, so that every turn can do any of the four. Three are
  # the same blend, with black, with the mean of luma, or with luma.
  bright, flatten, saturate, turn = rank

  def step(image, now):
    grey = luma(image)
    factor = jnp.where(now == bright, brightness, 1.0)
    factor = jnp.where(now == flatten, contrast, factor)
    factor = jnp.where(now == saturate, saturation, factor)
    other = jnp.where(now == flatten, grey.mean(), 0.0)
    other = jnp.where(now == saturate, grey, other)
    turned, blended = shift_hue(image, hue), blend(image, other, factor)
    return choose(now == turn, turned, blended)

  for now in range(4):
    image = step(image, now)
  return image


def gaussian_blur(
  image: Image,
  sigma: Float[Array, ""],
  *,
  kernel: int,
  dtype: Any = jnp.float32,
) -> Image:
  """A gaussian of `kernel` taps along both axes, mirrored at the borders.

  As two products with a banded matrix: 2 x 2 x 3 x s^3 FLOPs, which the matrix
  unit of a chip does while nine shifted copies would still be moving.

  Args:
    image: in [0, 1].
    sigma: in pixels, above 0.
    kernel: an odd number of taps, at most `2 s - 1`.
    dtype: of the products.
  """
  size = image[0].shape[0]
  radius = kernel // 2
  row, column = jnp.arange(size)[:, None], jnp.arange(size)[None, :]

  def taps(distance, exists=True):
    value = jnp.exp(-0.5 * (distance / sigma) ** 2)
    return jnp.where(exists & (jnp.abs(distance) <= radius), value, 0.0)

  # A pixel is also seen in the mirrors at 0 and at size - 1, where the border
  # pixel itself is not repeated.
  band = taps(row - column)
  band += taps(row + column, column > 0)
  band += taps(2 * (size - 1) - column - row, column < size - 1)
  band /= band.sum(axis=1, keepdims=True)
  # Around zero bfloat16 rounds least; the rows sum to one.
  centred = (jnp.stack(image) - 0.5).astype(dtype)
  blurred = geometry.matrix_product(band, centred, band) + 0.5
  return blurred[0], blurred[1], blurred[2]


def solarize(image: Image, threshold: float | int) -> Image:
  """Inverts what is at least `threshold` (of 0 to 255) bright."""
  return tuple(jnp.where(x >= threshold / 255.0, 1.0 - x, x) for x in image)


@dataclasses.dataclass(frozen=True)
class Jitter:
  """`jitter(p)`: ColorJitter in a random order, with probability `p`.

  Attributes:
    p: probability.
    brightness: the factor is uniform from `1 - brightness` (at least 0) to
      `1 + brightness`.
    contrast: likewise.
    saturation: likewise.
    hue: the shift is uniform from `-hue` to `hue` turns, at most 0.5.
  """

  p: float | int = 0.8
  brightness: float | int = 0.4
  contrast: float | int = 0.4
  saturation: float | int = 0.2
  hue: float | int = 0.1

  def __post_init__(self):
    draws.check_range("jitter", "p", self.p, high=1.0)
    for name in ("brightness", "contrast", "saturation"):
      draws.check_range("jitter", name, getattr(self, name))
    draws.check_range("jitter", "hue", self.hue, high=0.5)

  def draws(self) -> int:
    """Uniform numbers needed."""
    return 9

  def factors(self, u: Float[Array, "9"]) -> dict[str, Array]:
    """The arguments of `jitter_colour`, neutral where the coin says so."""
    # Neutral factors instead of a choice between two images: the unchanged
    # one need not be kept until the end.
    changed = draws.coin(u[0], self.p)

    def factor(u, spread):
      drawn = draws.between(u, max(0.0, 1.0 - spread), 1.0 + spread)
      return jnp.where(changed, drawn, 1.0)

    shift = draws.between(u[4], -self.hue, self.hue)
    return {
      "brightness": factor(u[1], self.brightness),
      "contrast": factor(u[2], self.contrast),
      "saturation": factor(u[3], self.saturation),
      "hue": jnp.where(changed, shift, 0.0),
      "rank": draws.ranks(u[5:]),
    }

  def __call__(self, image: Image, u: Float[Array, "9"], dtype: Any) -> Image:
    """The image, most often with its colours changed."""
    del dtype
    return jitter_colour(image, **self.factors(u))


@dataclasses.dataclass(frozen=True)
class Grey:
  """`grey(p)`: three equal channels of luma, with probability `p`."""

  p: float | int = 0.2

  def __post_init__(self):
    draws.check_range("grey", "p", self.p, high=1.0)

  def draws(self) -> int:
    """Uniform numbers needed."""
    return 1

  def __call__(self, image: Image, u: Float[Array, "1"], dtype: Any) -> Image:
    """The image, now and then without its colours."""
    del dtype
    return choose(draws.coin(u[0], self.p), (luma(image),) * 3, image)


@dataclasses.dataclass(frozen=True)
class Blur:
  """`blur(p)`: a gaussian of random width, with probability `p`.

  DINOv2 blurs its first global crop always, the second with probability 0.1
  and local crops with 0.5.

  Attributes:
    p: probability.
    sigma: range of the width in pixels, drawn uniformly.
    kernel: taps a side, odd.
  """

  p: float | int = 0.5
  sigma: tuple[float | int, float | int] = (0.1, 2.0)
  kernel: int = 9

  def __post_init__(self):
    draws.check_range("blur", "p", self.p, high=1.0)
    draws.check_pair("blur", "sigma", self.sigma)
    if self.kernel < 3 or self.kernel % 2 == 0:
      raise ConfigError(
        f"blur: kernel={self.kernel}; expected an odd number of taps from 3."
      )

  def draws(self) -> int:
    """Uniform numbers needed."""
    return 2

  def __call__(self, image: Image, u: Float[Array, "2"], dtype: Any) -> Image:
    """The image, now and then blurred."""
    sigma = draws.between(u[1], *self.sigma)
    # The narrowest gaussian is the identity, which is cheaper than keeping the
    # image to choose from.
    sigma = jnp.where(draws.coin(u[0], self.p), sigma, SHARP)
    return gaussian_blur(image, sigma, kernel=self.kernel, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Solarize:
  """`solarize(p)`: inverts bright pixels, with probability `p`.

  Attributes:
    p: probability; DINOv2 does it to its second global crop alone.
    threshold: of 0 to 255; what is at least as bright is inverted.
  """

  p: float | int = 0.2
  threshold: float | int = 128

  def __post_init__(self):
    draws.check_range("solarize", "p", self.p, high=1.0)
    draws.check_range("solarize", "threshold", self.threshold, high=255.0)

  def draws(self) -> int:
    """Uniform numbers needed."""
    return 1

  def __call__(self, image: Image, u: Float[Array, "1"], dtype: Any) -> Image:
    """The image, now and then solarised."""
    del dtype
    inverted = solarize(image, self.threshold)
    return choose(draws.coin(u[0], self.p), inverted, image)
