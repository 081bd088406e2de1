"""Descriptor matching by nearest neighbours, weighted by the ratio test.

With d1 and d2 the cosine distances to the nearest and the second nearest
descriptor of the other image, the weight of a match is 1 - d1 / d2 (Lowe 2004);
the matches of the highest weight are returned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

from mtv_jax.encoder.encoder import Encoder, normalize
from mtv_jax.evals.core import resizing
from mtv_jax.utils.errors import ConfigError, InputError

SIMILARITY = "cosine, float32, highest matmul precision"
TIE_RULE = "nearest: lowest index; kept: heaviest, then lowest index"
NORMS = ("none", "final")
MIN_DISTANCE = 1e-9
_MAX_QUERIES = 1024  # on the device at a time


@dataclasses.dataclass(frozen=True)
class Neighbours:
  """The two nearest cells of n descriptors, the nearest first.

  Attributes:
    index: of the cells, in row-major order.
    distance: cosine distances, 0 to 2.
  """

  index: Int[np.ndarray, "n 2"]
  distance: Float32[np.ndarray, "n 2"]


@dataclasses.dataclass(frozen=True)
class Matches:
  """k matches, the highest weight first.

  Attributes:
    first: cells of the first map (row, column).
    second: cells of the second map.
    weight: 0 (equal distances) to 1.
  """

  first: Int[np.ndarray, "k 2"]
  second: Int[np.ndarray, "k 2"]
  weight: Float[np.ndarray, " k"]


def match(
  first: Float32[np.ndarray, "h w d"],
  second: Float32[np.ndarray, "h2 w2 d"],
  *,
  first_valid: Bool[np.ndarray, "s t"],
  second_valid: Bool[np.ndarray, "s2 t2"],
  keep: int,
  block_bytes: int = 2**22,
) -> Matches:
  """The `keep` matches of the highest weight between two feature maps.

  Features are upsampled to the cells, bicubic with a = -0.75 and half-pixel
  centres (torch's default), and normalised. Every valid cell of the first map
  has one match; a cell of the second may have many.

  Args:
    first: a map of patch tokens.
    second: of the other view.
    first_valid: cells to match.
    second_valid: cells to match with; at least two.
    keep: number of matches, or all if there are fewer cells.
    block_bytes: as for `two_nearest`.

  Raises:
    InputError: as `two_nearest`.
  """
  queries = np.asarray(_upsampled(first, first_valid.shape))[first_valid]
  nearest = two_nearest(
    queries, second, valid=second_valid, block_bytes=block_bytes
  )
  weight = ratio_weights(nearest.distance)
  # Stable: among equal weights the lowest index comes first.
  order = np.argsort(-weight, kind="stable")[:keep]
  cells = np.unravel_index(nearest.index[order, 0], second_valid.shape)
  return Matches(
    first=np.argwhere(first_valid)[order],
    second=np.stack(cells, axis=-1),
    weight=weight[order],
  )


def two_nearest(
  queries: Float32[np.ndarray, "n d"],
  candidates: Float32[np.ndarray, "h w d"],
  *,
  valid: Bool[np.ndarray, "s t"],
  block_bytes: int = 2**22,
) -> Neighbours:
  """The two valid cells of the highest cosine in an upsampled map.

  Among equals the lowest index is nearest. A zero vector is at distance 1 from
  all others. Where `valid` has the size of the map, nothing is upsampled.

  Args:
    queries: of any norm.
    candidates: the map, neither upsampled nor normalised.
    valid: at least two cells.
    block_bytes: of the largest block of similarities.

  Raises:
    InputError: for fewer than two valid cells, or features that are not finite.
  """
  for name, rows in (("queries", queries), ("candidates", candidates)):
    finite = np.isfinite(rows).all(axis=-1)
    if not finite.all():
      raise InputError(
        f"{finite.size - finite.sum()} of {finite.size} {name} are not finite: "
        "the encoder diverged, or its weights are damaged"
      )
  if valid.sum() < 2:
    raise InputError(
      f"{valid.sum()} candidates: a ratio of distances needs at least two"
    )
  # Blocks of one size, so that few shapes are compiled.
  rows = min(_MAX_QUERIES, max(128, 1 << (len(queries) - 1).bit_length()))
  block = max(1, min(rows, block_bytes // (4 * valid.size)))
  block = 1 << (block.bit_length() - 1)  # divides the rows
  fine = _upsampled(candidates, valid.shape)
  candidates, unit = jnp.asarray(candidates), normalize(queries)
  blocks = []
  for start in range(0, len(queries), rows):
    batch = unit[start : start + rows]
    batch = np.pad(batch, ((0, rows - len(batch)), (0, 0)))
    blocks.append(_nearest(batch, candidates, fine, valid, block))
  index, distance = (
    np.concatenate([np.asarray(part) for part in parts])[: len(queries)]
    for parts in zip(*blocks, strict=True)
  )
  return Neighbours(index, distance)


@functools.partial(jax.jit, static_argnums=1)
def _upsampled(features, size):
  return resizing.resize(features, size, method="bicubic")


@functools.partial(jax.jit, static_argnums=4)
def _nearest(queries, candidates, fine, valid, block):
  norm = jnp.maximum(jnp.linalg.norm(fine, axis=-1), 1e-12)  # [S, T]

  def nearest_two(query):
    # Upsamples similarities, not descriptors: the same sums in another order,
    # for a tenth of the products.
    scores = jnp.einsum(
      "d,hwd->hw", query, candidates, precision=jax.lax.Precision.HIGHEST
    )
    scores = resizing.resize_maps(scores, valid.shape, method="bicubic")
    scores = jnp.where(valid, scores / norm, -jnp.inf).reshape(-1)
    best = _argmax(scores)
    rest = jnp.where(jnp.arange(scores.size) == best, -jnp.inf, scores)
    return jnp.stack([best, _argmax(rest)])

  index = jax.lax.map(nearest_two, queries, batch_size=block)
  distance = _distances(queries, fine.reshape(valid.size, -1)[index])
  swapped = (distance[:, 1] < distance[:, 0]) | (
    (distance[:, 1] == distance[:, 0]) & (index[:, 1] < index[:, 0])
  )
  swapped = swapped[:, None]
  return (
    jnp.where(swapped, index[:, ::-1], index),
    jnp.where(swapped, distance[:, ::-1], distance),
  )


def _argmax(scores):
  # Two reductions are three times as fast as argmax on a CPU.
  index = jnp.arange(scores.size, dtype=jnp.int32)
  return jnp.min(jnp.where(scores == scores.max(), index, scores.size - 1))


def _distances(queries, near):
  """Cosine distances of unit `[q, d]` to their two nearest `[q, 2, d]`.

  For unit vectors, 1 - cos is half the squared norm of their difference, which
  does not cancel; and equal candidates have exactly equal distances.
  """
  length = jnp.linalg.norm(near, axis=-1, keepdims=True)
  unit = near / jnp.maximum(length, 1e-12)
  square = jnp.sum(jnp.square(queries[:, None] - unit), axis=-1)
  zero = ~queries.any(axis=-1)[:, None] | (length[..., 0] == 0)
  return jnp.where(zero, 1.0, square / 2)


def ratio_weights(
  distance: Float[np.ndarray, "n 2"],
) -> Float64[np.ndarray, " n"]:
  """`1 - d1 / d2`, with distances of at least 1e-9."""
  distance = np.maximum(np.asarray(distance, np.float64), MIN_DISTANCE)
  return 1 - distance[:, 0] / distance[:, 1]


def patch_features(
  encoder: Encoder,
  images: Sequence[np.ndarray],
  *,
  layer: int,
  norm: str,
  batch_size: int,
) -> Float32[np.ndarray, "n h w d"]:
  """Patch tokens of images at their own size.

  Args:
    encoder: of the tokens.
    images: uint8 `[s, s, 3]`, all of one size.
    layer: the block; -1 is the last.
    norm: `none` for the output of the block, `final` for the last block's
      after the final norm.
    batch_size: images a step.

  Raises:
    ConfigError: for the final norm of another block than the last.
  """
  if norm == "none":
    out = encoder.dense(
      images, layers=(layer,), outputs=(), batch_size=batch_size
    )
    return out.layers[layer]
  depth = encoder.spec.image.depth
  if layer not in (-1, depth - 1):
    raise ConfigError(
      f"norm='final' with layer={layer}: the final norm follows the last block "
      f"only, -1 or {depth - 1}; use norm='none'"
    )
  return encoder.dense(images, batch_size=batch_size).patches


def input_size(encoder: Encoder, size: int | None, *, published: int) -> int:
  """Side of the input: `size`, or the published one for this patch size.

  Published sizes are for patches of 16. Where the patch does not divide them,
  the grid stays equal rather than the pixels, as in DINOv3's evaluations (448
  with patches of 14 for NAVI's 512).

  Raises:
    ConfigError: for a size that the patch does not divide.
  """
  patch = encoder.spec.image.patch_size
  if size is None:
    return published if published % patch == 0 else published // 16 * patch
  if size < patch or size % patch:
    lower = max(size // patch, 1) * patch
    raise ConfigError(
      f"size={size}: {encoder!r} has patches of {patch}, which must divide it, "
      f"as they do {lower} and {lower + patch}"
    )
  return size


def check_counts(what: str, **values: int | None) -> None:
  """Raises ConfigError for an option below 1; None is a default."""
  for field, value in values.items():
    if value is not None and value < 1:
      raise ConfigError(f"{what}: {field}={value}; expected at least 1")
