"""Matching descriptors by their two nearest neighbours, and the test of ratios.

A match is trusted the more, the farther its second best is (Lowe 2004): with
d1 and d2 the cosine distances to the nearest and the second nearest descriptor
of the other image, its weight is 1 - d1 / d2, and the heaviest are kept.
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

SIMILARITY = "cosine, float32, highest matmul precision"
TIE_RULE = "nearest: lowest index; kept: heaviest, then lowest index"
NORMS = ("none", "final")
MIN_DISTANCE = 1e-9
_PORTION = 1024  # queries that are handed to the device at a time


@dataclasses.dataclass(frozen=True)
class Neighbours:
  """The two nearest cells of n descriptors, the nearest first.

  Attributes:
    index: which cells, counted along rows.
    distance: cosine distances, 0 to 2.
  """

  index: Int[np.ndarray, "n 2"]
  distance: Float32[np.ndarray, "n 2"]


@dataclasses.dataclass(frozen=True)
class Matches:
  """k matches, the heaviest first.

  Attributes:
    first: cells of the first map (row, column).
    second: cells of the second map.
    weight: 0 (the second best is as near) to 1.
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
  """The `keep` heaviest matches of two feature maps.

  Features are upsampled to the cells, bicubic with a = -0.75 and pixels as
  areas (torch's default), and normalised. Every valid cell of the first map is
  matched with one of the second, which may have many matches.

  Args:
    first: a map of patch tokens.
    second: of the other view.
    first_valid: which cells to match.
    second_valid: which cells may be matched; at least two.
    keep: how many matches to return, or all if there are fewer cells.
    block_bytes: as for `two_nearest`.

  Raises:
    ValueError: as `two_nearest`.
  """
  queries = np.asarray(_upsampled(first, first_valid.shape))[first_valid]
  found = two_nearest(
    queries, second, valid=second_valid, block_bytes=block_bytes
  )
  weight = ratio_weights(found.distance)
  # A stable sort, so that of equal weights the lowest index comes first.
  kept = np.argsort(-weight, kind="stable")[:keep]
  cells = np.unravel_index(found.index[kept, 0], second_valid.shape)
  return Matches(
    first=np.argwhere(first_valid)[kept],
    second=np.stack(cells, axis=-1),
    weight=weight[kept],
  )


def two_nearest(
  queries: Float32[np.ndarray, "n d"],
  candidates: Float32[np.ndarray, "h w d"],
  *,
  valid: Bool[np.ndarray, "s t"],
  block_bytes: int = 2**22,
) -> Neighbours:
  """For each query, the two valid cells of an upsampled map of highest cosine.

  Among equals the lowest index is nearest. A zero vector is at distance 1 of
  everything. Where `valid` has the size of the map, nothing is upsampled.

  Args:
    queries: of any length; they are normalised here.
    candidates: the map, not upsampled and not normalised.
    valid: at least two cells.
    block_bytes: size of the largest block of similarities held.

  Raises:
    ValueError: for fewer than two valid cells, or features that are not finite.
  """
  for name, rows in (("queries", queries), ("candidates", candidates)):
    finite = np.isfinite(rows).all(axis=-1)
    if not finite.all():
      raise ValueError(
        f"{finite.size - finite.sum()} of {finite.size} {name} are not finite: "
        "the encoder diverged, or its weights are damaged"
      )
  if valid.sum() < 2:
    raise ValueError(
      f"{valid.sum()} candidates: a ratio of distances needs at least two"
    )
  # Queries in portions of one size, so that few shapes are compiled.
  rows = min(_PORTION, max(128, 1 << (len(queries) - 1).bit_length()))
  block = max(1, min(rows, block_bytes // (4 * valid.size)))
  block = 1 << (block.bit_length() - 1)  # divides the portion
  fine = _upsampled(candidates, valid.shape)
  candidates, unit = jnp.asarray(candidates), normalize(queries)
  found = []
  for start in range(0, len(queries), rows):
    portion = unit[start : start + rows]
    portion = np.pad(portion, ((0, rows - len(portion)), (0, 0)))
    found.append(_nearest(portion, candidates, fine, valid, block))
  index, distance = (
    np.concatenate([np.asarray(part) for part in parts])[: len(queries)]
    for parts in zip(*found, strict=True)
  )
  return Neighbours(index, distance)


@functools.partial(jax.jit, static_argnums=1)
def _upsampled(features, size):
  return resizing.resize(features, size, method="bicubic")


@functools.partial(jax.jit, static_argnums=4)
def _nearest(queries, candidates, fine, valid, block):
  length = jnp.maximum(jnp.linalg.norm(fine, axis=-1), 1e-12)

  def of(query):
    # Similarities are upsampled rather than descriptors multiplied: the same
    # sums in another order, for a tenth of the products.
    scores = jnp.einsum(
      "d,hwd->hw", query, candidates, precision=jax.lax.Precision.HIGHEST
    )
    scores = resizing.resize_maps(scores, valid.shape, method="bicubic")
    scores = jnp.where(valid, scores / length, -jnp.inf).reshape(-1)
    best = _first_of_best(scores)
    rest = jnp.where(jnp.arange(scores.size) == best, -jnp.inf, scores)
    return jnp.stack([best, _first_of_best(rest)])

  index = jax.lax.map(of, queries, batch_size=block)
  distance = _distances(queries, fine.reshape(valid.size, -1)[index])
  swapped = (distance[:, 1] < distance[:, 0]) | (
    (distance[:, 1] == distance[:, 0]) & (index[:, 1] < index[:, 0])
  )
  swapped = swapped[:, None]
  return (
    jnp.where(swapped, index[:, ::-1], index),
    jnp.where(swapped, distance[:, ::-1], distance),
  )


def _first_of_best(scores):
  # What argmax gives; two plain reductions are three times as fast on a CPU.
  places = jnp.arange(scores.size, dtype=jnp.int32)
  return jnp.min(jnp.where(scores == scores.max(), places, scores.size - 1))


def _distances(queries, near):
  """Cosine distances of unit `[q, d]` to the two `[q, 2, d]` that are near.

  Of unit vectors 1 - cos is half the square of their difference, which keeps
  its digits where 1 - cos has lost them; and equal candidates are at equal
  distances, whatever a product has rounded.
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
  held = np.maximum(np.asarray(distance, np.float64), MIN_DISTANCE)
  return 1 - held[:, 0] / held[:, 1]


def patch_features(
  encoder: Encoder,
  images: Sequence[np.ndarray],
  *,
  layer: int,
  norm: str,
  batch_size: int,
) -> Float32[np.ndarray, "n h w d"]:
  """Patch tokens of images at the size they come in.

  Args:
    encoder: whose.
    images: uint8 `[s, s, 3]`, all of one size.
    layer: the block; -1 is the last.
    norm: `none` takes a block's output as it is, `final` the last block's
      after the encoder's final norm.
    batch_size: images a step.

  Raises:
    ValueError: for the final norm of another block than the last.
  """
  if norm == "none":
    out = encoder.dense(
      images, layers=(layer,), outputs=(), batch_size=batch_size
    )
    return out.layers[layer]
  depth = encoder.spec.image.depth
  if layer not in (-1, depth - 1):
    raise ValueError(
      f"norm='final' with layer={layer}: the final norm follows the last block "
      f"only, -1 or {depth - 1}; use norm='none'"
    )
  return encoder.dense(images, batch_size=batch_size).patches


def input_size(encoder: Encoder, size: int | None, *, published: int) -> int:
  """Side of the input: `size`, or the published one made for this patch.

  Published sizes are those of patches of 16. Where another patch does not
  divide them, the grid is kept rather than the pixels, as DINOv3's evaluations
  do (448 with patches of 14 for NAVI's 512).

  Raises:
    ValueError: for a size that the patch does not divide.
  """
  patch = encoder.spec.image.patch_size
  if size is None:
    return published if published % patch == 0 else published // 16 * patch
  if size < patch or size % patch:
    lower = max(size // patch, 1) * patch
    raise ValueError(
      f"size={size}: {encoder!r} has patches of {patch}, which must divide it, "
      f"as they do {lower} and {lower + patch}"
    )
  return size


def check_counts(what: str, **values: int | None) -> None:
  """Raises ValueError for a number below 1; None stands for a default."""
  for field, value in values.items():
    if value is not None and value < 1:
      raise ValueError(f"{what}: {field}={value}; expected at least 1")
