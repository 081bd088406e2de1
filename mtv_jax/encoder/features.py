"""Return types of an encoder: features, regions and boxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from mtv_jax.utils.errors import InputError

OUTPUTS = ("pooled", "patches", "prefix")


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
  """Features of n images; outputs that were not requested are None.

  Attributes:
    pooled: pooled embedding, not normalised.
    patches: patch tokens after the final norm, on their grid `[n, h, w, d]`.
    prefix: CLS token and registers after the final norm.
    layers: patch tokens by block index, before the final norm.
    prefix_layers: CLS token and registers by block index, before the final
      norm.
    grids: with the preprocessing `native`, patch rows and columns per image.
      `patches` and `layers` are then `[n, l, d]` in row-major order; the first
      rows * columns are valid.
  """

  pooled: Float32[np.ndarray, "n e"] | None
  patches: Float32[np.ndarray, "n *grid d"] | None
  prefix: Float32[np.ndarray, "n p d"] | None
  layers: dict[int, Float32[np.ndarray, "n *grid d"]]
  prefix_layers: dict[int, Float32[np.ndarray, "n p d"]] = dataclasses.field(
    default_factory=dict
  )
  grids: Int32[np.ndarray, "n 2"] | None = None


def mean_patches(
  tokens: Float[np.ndarray, "n *grid d"],
  grids: Int32[np.ndarray, "n 2"] | None = None,
) -> Float[np.ndarray, "n d"]:
  """Mean patch token per image.

  With `grids` (see `ImageFeatures`) tokens are padded, `[n, l, d]`.
  """
  if grids is None:
    return tokens.mean(axis=(1, 2))
  valid = np.arange(tokens.shape[1]) < grids.prod(axis=1)[:, None]
  return tokens.mean(axis=1, where=valid[..., None])


@dataclasses.dataclass(frozen=True)
class Regions:
  """Unit-length embeddings of up to m boxes per image; zero if invalid."""

  embeddings: Float32[np.ndarray, "n m e"]
  valid: Bool[np.ndarray, "n m"]


@dataclasses.dataclass(frozen=True)
class Boxes:
  """Boxes of up to m phrases per image; zero if invalid.

  (y0, x0, y1, x1) in the image's unit square; boxes may extend beyond it.
  """

  boxes: Float32[np.ndarray, "n m 4"]
  valid: Bool[np.ndarray, "n m"]


def normalize(x: Float[np.ndarray, "*n e"]) -> Float32[np.ndarray, "*n e"]:
  """L2-normalises the last axis; zero rows stay zero."""
  x = np.asarray(x, np.float32)
  length = np.linalg.norm(x, axis=-1, keepdims=True)
  return x / np.maximum(length, 1e-12)


def block_index(index: int, depth: int) -> int:
  """Resolves a block index, which may be negative."""
  if not -depth <= index < depth:
    raise InputError(
      f"layer {index} of an encoder with {depth} blocks; expected 0.."
      f"{depth - 1}, or -{depth}..-1 from the end"
    )
  return index % depth


def check_outputs(outputs: Iterable[str]) -> None:
  """Raises InputError for unknown outputs of an image tower."""
  unknown = [o for o in outputs if o not in OUTPUTS]
  if unknown or isinstance(outputs, str):
    raise InputError(f"outputs={outputs!r}; expected some of {OUTPUTS}")
