"""Nearest-neighbour descriptor matching with ratio-test weights.

With d1 and d2 the cosine distances to the two nearest descriptors of the second
image, the weight of a match is 1 - d1 / d2 (Lowe 2004). Matches with the
highest weights are returned.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

from mtv_jax.encoder.features import normalize
from mtv_jax.evals.core import ranking, resizing
from mtv_jax.utils.errors import InputError

TIE_RULE = "nearest: lowest index; matches: highest weight, then lowest index"
MIN_DISTANCE = 1e-9
_MAX_QUERIES = 1024  # on the device at a time


class PatchMatches(NamedTuple):
  """k matches of cells (row, column), by decreasing weight."""

  first: Int[np.ndarray, "k 2"]
  second: Int[np.ndarray, "k 2"]
  weight: Float[np.ndarray, " k"]  # 0 (equal distances) to 1


def match(
  first: Float32[np.ndarray, "h w d"],
  second: Float32[np.ndarray, "h2 w2 d"],
  *,
  first_valid: Bool[np.ndarray, "s t"],
  second_valid: Bool[np.ndarray, "s2 t2"],
  keep: int,
) -> PatchMatches:
  """The `keep` highest-weight matches between two token maps.

  Features are upsampled to the cells (bicubic, a = -0.75, half-pixel centres,
  as in torch) and normalised. Every valid cell of the first map has one match;
  a cell of the second may have many.
  """
  queries = np.asarray(_upsample(first, first_valid.shape))[first_valid]
  index, distance = two_nearest(queries, second, valid=second_valid)
  weight = ratio_weights(distance)
  # Stable: ties go to the lowest index.
  order = np.argsort(-weight, kind="stable")[:keep]
  cells = np.unravel_index(index[order, 0], second_valid.shape)
  first_cells = np.argwhere(first_valid)[order]
  return PatchMatches(first_cells, np.column_stack(cells), weight[order])


def two_nearest(
  queries: Float32[np.ndarray, "n d"],
  candidates: Float32[np.ndarray, "h w d"],
  *,
  valid: Bool[np.ndarray, "s t"],
  block_bytes: int = 2**22,
) -> tuple[Int[np.ndarray, "n 2"], Float32[np.ndarray, "n 2"]]:
  """The two valid cells with the highest cosine in an upsampled map.

  Returns row-major indices and cosine distances (0 to 2), nearest first. Ties
  go to the lowest index. A zero vector has distance 1 to every vector. Inputs
  need not be normalised. `block_bytes` limits a block of similarities.
  """
  ranking.check_finite(queries=queries, candidates=candidates)
  if (count := valid.sum()) < 2:
    raise InputError(f"{count} candidates; a ratio of distances needs two")
  # Batches of one size, so that few shapes are compiled.
  batch_size = min(_MAX_QUERIES, max(128, 1 << (len(queries) - 1).bit_length()))
  block = max(1, min(batch_size, block_bytes // (4 * valid.size)))
  block = 1 << (block.bit_length() - 1)  # divides the batch
  fine_map = _upsample(candidates, valid.shape)
  candidates, unit = jnp.asarray(candidates), normalize(queries)
  blocks = []
  for start in range(0, len(queries), batch_size):
    batch = unit[start : start + batch_size]
    batch = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
    blocks.append(_find_two_nearest(batch, candidates, fine_map, valid, block))
  return tuple(
    np.concatenate([np.asarray(part) for part in parts])[: len(queries)]
    for parts in zip(*blocks, strict=True)
  )


@functools.partial(jax.jit, static_argnums=1)
def _upsample(features, size):
  return resizing.resize(features, size, method="bicubic")


@functools.partial(jax.jit, static_argnums=4)
def _find_two_nearest(queries, candidates, fine_map, valid, block):
  norm = jnp.maximum(jnp.linalg.norm(fine_map, axis=-1), 1e-12)  # [S, T]

  def nearest_two(query):
    # Upsampling similarities instead of descriptors reorders the sums and needs
    # a tenth of the products.
    scores = jnp.einsum(
      "d,hwd->hw", query, candidates, precision=jax.lax.Precision.HIGHEST
    )
    scores = resizing.resize_maps(scores, valid.shape, method="bicubic")
    scores = jnp.where(valid, scores / norm, -jnp.inf).reshape(-1)
    nearest = _argmax(scores)
    others = jnp.where(jnp.arange(scores.size) == nearest, -jnp.inf, scores)
    return jnp.stack([nearest, _argmax(others)])

  index = jax.lax.map(nearest_two, queries, batch_size=block)
  distance = _cosine_distances(queries, fine_map.reshape(valid.size, -1)[index])
  # Exact distances decide the order, then the index.
  return jax.lax.sort((distance, index), dimension=1, num_keys=2)[::-1]


def _argmax(scores):
  # Two reductions are three times faster than argmax on a CPU.
  index = jnp.arange(scores.size, dtype=jnp.int32)
  return jnp.min(jnp.where(scores == scores.max(), index, scores.size - 1))


def _cosine_distances(queries, nearest):
  """Cosine distances of unit `[q, d]` to their two nearest `[q, 2, d]`.

  For unit vectors, 1 - cos is half the squared norm of their difference, which
  avoids cancellation and gives equal candidates exactly equal distances.
  """
  length = jnp.linalg.norm(nearest, axis=-1, keepdims=True)
  unit = nearest / jnp.maximum(length, 1e-12)
  square = jnp.sum(jnp.square(queries[:, None] - unit), axis=-1)
  is_zero = ~queries.any(axis=-1)[:, None] | (length[..., 0] == 0)
  return jnp.where(is_zero, 1.0, square / 2)


def ratio_weights(
  distance: Float[np.ndarray, "n 2"],
) -> Float64[np.ndarray, " n"]:
  """`1 - d1 / d2`, with distances clamped to at least 1e-9."""
  distance = np.maximum(np.asarray(distance, np.float64), MIN_DISTANCE)
  return 1 - distance[:, 0] / distance[:, 1]
