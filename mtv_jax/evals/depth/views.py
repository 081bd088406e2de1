"""From an image to what the encoder reads of it, and back to its pixels.

An image is brought to the input's size, then padded around to a multiple of
the patch with the encoder's mean colour. Predictions are resampled over the
padded input and the padding is cut off again, so that patch and pixel stay
where they were.
"""

from __future__ import annotations

import dataclasses
import functools

import cv2
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import resizing


@dataclasses.dataclass(frozen=True)
class View:
  """How images of one size are shown to an encoder.

  Attributes:
    size: rows and columns of the image.
    input_size: what it is resized to.
    patch: pixels a side.
    resize: of predictions, a method of `resizing`.
  """

  size: tuple[int, int]
  input_size: tuple[int, int]
  patch: int
  resize: str

  @property
  def padded(self) -> tuple[int, int]:
    """The input's size with its padding."""
    h, w = (-(-side // self.patch) * self.patch for side in self.input_size)
    return h, w

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches."""
    return self.padded[0] // self.patch, self.padded[1] // self.patch

  def place(
    self,
    image: Float[np.ndarray, "h w 3"],
    mean: tuple[float, float, float],
  ) -> Float32[np.ndarray, "h2 w2 3"]:
    """The padded input of an image in 0..255.

    Args:
      image: of `size`.
      mean: of the encoder's normalisation, in 0..1: what becomes zero.
    """
    if image.shape[:2] != self.size:
      raise ValueError(
        f"an image of {image.shape[0]} x {image.shape[1]} among images of "
        f"{self.size[0]} x {self.size[1]}: all of them must have one size"
      )
    height, width = self.input_size
    if self.size != self.input_size:
      shrinks = height * width < self.size[0] * self.size[1]
      method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
      image = cv2.resize(
        np.ascontiguousarray(image), (width, height), interpolation=method
      )
    if self.padded == self.input_size:
      return np.ascontiguousarray(image, np.float32)
    top, left = _margin(height, self.patch), _margin(width, self.patch)
    placed = np.empty((*self.padded, 3), np.float32)
    placed[:] = 255 * np.float32(mean)
    placed[top : top + height, left : left + width] = image
    return placed

  def restore(
    self,
    maps: Float[Array, "b gh gw"] | Float[np.ndarray, "b gh gw"],
    size: tuple[int, int] | None = None,
  ) -> Float[Array, "b h w"] | Float[np.ndarray, "b h w"]:
    """LabelMaps over the padded input, resampled to the pixels of the image.

    Args:
      maps: of any resolution.
      size: rows and columns wanted, of the image by default.
    """
    rows, columns = (
      restoring_matrix(
        maps.shape[i + 1], self.input_size[i], side, self.patch, self.resize
      )
      for i, side in enumerate(size or self.size)
    )
    if isinstance(maps, np.ndarray):
      return rows @ maps @ columns.T
    precise = functools.partial(jnp.matmul, precision="highest")
    return precise(precise(jnp.asarray(rows), maps), jnp.asarray(columns.T))


def _margin(side: int, patch: int) -> int:
  """Padding before; with an odd number of pixels the larger part is after."""
  return -side % patch // 2


@functools.lru_cache(maxsize=64)
def restoring_matrix(
  grid: int, input_side: int, side: int, patch: int, method: str
) -> Float32[np.ndarray, "side grid"]:
  """Along one axis: over the padded input, padding off, to the image's side."""
  padded = -(-input_side // patch) * patch
  top = _margin(input_side, patch)
  spread = resizing.matrix(grid, padded, method)[top : top + input_side]
  if padded == input_side:
    # In one go: interpolating twice would smooth twice.
    spread = resizing.matrix(grid, side, method)
  elif input_side != side:
    spread = resizing.matrix(input_side, side, method) @ spread
  made = spread.astype(np.float32)
  made.setflags(write=False)  # cached, so shared by every caller
  return made


def features(
  encoder: Encoder,
  images: list[np.ndarray],
  *,
  layers: tuple[int, ...],
  norm: str,
  cls: str,
  batch_size: int,
) -> Float32[np.ndarray, "n h w c"]:
  """What a probe reads: the layers' patches, each with its CLS token.

  Args:
    encoder: whose features.
    images: inputs of one size, in 0..255.
    layers: blocks, one after the other along the channels. With the final norm
      there can only be the last one.
    norm: `final` or `none`, see `depth_recipes.Recipe`.
    cls: `concat` or `none`; an encoder without a CLS token has none to add.
    batch_size: images a step.
  """
  token = cls == "concat" and encoder.spec.image.cls_token
  outputs = ("patches", "prefix") if token else ("patches",)
  if norm == "final":
    found = encoder.dense(images, outputs=outputs, batch_size=batch_size)
    pairs = [(found.patches, found.prefix)]
  else:
    found = encoder.dense(
      images, layers=layers, outputs=(), batch_size=batch_size
    )
    pairs = [(found.layers[i], found.prefix_layers.get(i)) for i in layers]
  parts = []
  for patches, prefix in pairs:
    parts.append(patches)
    if token:
      first = prefix[:, None, None, 0]
      parts.append(np.broadcast_to(first, patches.shape))
  return np.concatenate(parts, axis=-1)


def channels(encoder: Encoder, *, layers: tuple[int, ...], cls: str) -> int:
  """How many channels `features` gives."""
  token = cls == "concat" and encoder.spec.image.cls_token
  return len(layers) * encoder.spec.image.width * (2 if token else 1)
