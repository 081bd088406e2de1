"""Ranks of the correct candidates, with a tie rule.

The rank of a candidate is its index in a stable sort by decreasing score: the
number of higher scores plus the number of ties with a lower index. A query with
several correct candidates gets the best of their ranks. Used by retrieval and
by zero-shot classification, whose candidates are classes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from mtv_jax.utils.errors import InputError

TIE_RULE = "rank = number better + number equal with a lower index"


def ranks(
  queries: Float32[np.ndarray, "q e"],
  candidates: Float32[np.ndarray, "c e"],
  *,
  query_ids: Int[np.ndarray, " q"],
  candidate_ids: Int[np.ndarray, " c"],
  block_bytes: int = 2**26,
) -> Int[np.ndarray, " q"]:
  """For each query, the best rank of a candidate with its id.

  Scores are float32 dot products at the highest matmul precision (the TPU
  default rounds to bfloat16 and reorders neighbours), computed in blocks of
  queries. Equal candidates are scored once: a matrix product may give them
  scores that differ in the last bit, which would break the tie.
  """
  check_finite(queries=queries, candidates=candidates)
  missing = np.setdiff1d(query_ids, candidate_ids)
  if missing.size:
    raise InputError(
      f"{missing.size} query ids have no correct candidate (the first is "
      f"{missing[0]})"
    )
  unique, inverse = _unique_rows(candidates)
  rows = max(1, min(len(queries), block_bytes // (4 * len(candidates))))
  blocks = []
  for start in range(0, len(queries), rows):
    block = queries[start : start + rows]
    ids = query_ids[start : start + rows]
    # The last block is padded, so that only one shape is compiled.
    padding = rows - len(block)
    block_ranks = _rank_block(
      np.pad(block, ((0, padding), (0, 0))),
      np.pad(ids, (0, padding), mode="edge"),
      unique,
      inverse,
      candidate_ids,
    )
    blocks.append(np.asarray(block_ranks)[: len(block)])
  return np.concatenate(blocks)


def check_finite(**features: Float[np.ndarray, "..."]) -> None:
  """Raises InputError for non-finite features, passed by name."""
  for name, x in features.items():
    # The extremes reveal any NaN or infinity without a mask of the array.
    if x.size and not np.isfinite([x.min(), x.max()]).all():
      finite = np.isfinite(x).all(axis=-1)
      raise InputError(
        f"{(~finite).sum()} of {finite.size} {name} are not finite (the first "
        f"is number {np.argmin(finite)}): the encoder diverged, or its weights "
        "are corrupt"
      )


def ranks_of_scores(
  scores: Float[Array, "q c"] | Float[np.ndarray, "q c"],
  is_correct: Bool[Array, "q c"] | Bool[np.ndarray, "q c"],
) -> Int[Array, " q"]:
  """The best rank of a correct candidate in each row."""
  scores = jnp.asarray(scores)
  # argmax returns the first of equal scores, which has the best rank.
  best = jnp.argmax(jnp.where(is_correct, scores, -jnp.inf), axis=1)[:, None]
  best_score = jnp.take_along_axis(scores, best, axis=1)
  is_earlier = jnp.arange(scores.shape[1])[None] < best
  is_better = (scores > best_score) | ((scores == best_score) & is_earlier)
  return jnp.sum(is_better, axis=1)


def chance(num_correct: Int[np.ndarray, " q"], count: int, k: int) -> float:
  """Mean hit rate of k random candidates out of `count`.

  `num_correct` counts the correct candidates of each query. C(count -
  num_correct, k) of the C(count, k) draws miss them all.
  """
  total = math.comb(count, k := min(k, count))
  hits = sum(total - math.comb(count - int(m), k) for m in num_correct)
  return hits / (total * len(num_correct))


@jax.jit
def _rank_block(queries, query_ids, unique, inverse, candidate_ids):
  scores = jnp.matmul(queries, unique.T, precision=jax.lax.Precision.HIGHEST)
  is_correct = query_ids[:, None] == candidate_ids[None]
  return ranks_of_scores(scores[:, inverse], is_correct)


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Distinct rows in order of appearance, and the index of each row in them."""
  index: dict[bytes, int] = {}
  # Adding zero turns -0.0 into 0.0, so that equal values have equal bytes.
  keys = (row.tobytes() for row in rows + np.float32(0))
  inverse = np.fromiter(
    (index.setdefault(key, len(index)) for key in keys), np.int32, len(rows)
  )
  _, first_rows = np.unique(inverse, return_index=True)
  return rows[first_rows], inverse
