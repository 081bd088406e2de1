"""k-NN classification of frozen features (Wu et al. 2018, as DINOv2 does it).

With unit features, s_j the cosines of a test image with its K nearest training
images, in decreasing order, and K the largest k asked for,

    w = softmax(s / T),   prediction_k = argmax_c  sum of w_j, j <= k, y_j = c

T = 0.07. Normalising over K rather than k changes no prediction.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Float32, Int

from mtv_jax.encoder.encoder import Encoder, normalize
from mtv_jax.evals.classification.common import OneVector
from mtv_jax.evals.core import probe
from mtv_jax.evals.core.base import Result
from mtv_jax.parallel.mesh import (
  BATCH_SPEC,
  make_mesh,
  num_batch_shards,
  replicated_sharding,
)

KS = (10, 20, 100, 200)


@dataclasses.dataclass(frozen=True)
class KNN(OneVector):
  """k-NN classification.

  Attributes:
    k: numbers of neighbours, capped by the images to search.
    temperature: of the softmax over similarities.
  """

  k: tuple[int, ...] = KS
  temperature: float = 0.07

  def __post_init__(self):
    super().__post_init__()
    if not self.k or min(self.k) < 1:
      raise ValueError(f"KNN: k={self.k}; expected numbers of at least 1")

  def run(self, encoder: Encoder) -> Result:
    """Top-1 accuracy for each k."""
    data, encoder = self._set, self._view(encoder)
    bank = normalize(self._embed(encoder, data.train))
    queries = normalize(self._embed(encoder, data.test))
    ks = sorted({min(k, len(bank)) for k in self.k})
    mesh = getattr(encoder, "mesh", None)
    predicted = predict(
      neighbours(queries, bank, k=ks[-1], mesh=mesh),
      data.train.labels,
      ks=ks,
      classes=data.classes,
      temperature=self.temperature,
    )
    metrics = {
      f"top1_k{k}": float(np.mean(p == data.test.labels))
      for k, p in predicted.items()
    }
    protocol = {
      **self._common(encoder),
      "k": list(ks),
      "temperature": self.temperature,
      "weights_of_neighbours": f"softmax(cosine / temperature) over {ks[-1]}",
      "similarity": "cosine, float32, highest matmul precision",
      "ties": "neighbours and classes of equal score: lowest index first",
    }
    return Result(metrics, protocol, dict.fromkeys(metrics, 1 / data.classes))


@dataclasses.dataclass(frozen=True)
class Neighbours:
  """The nearest rows of a bank, the nearest first.

  Attributes:
    similarity: `[q, k]`, decreasing.
    index: `[q, k]`, in the bank; the lower one first where they are equal.
  """

  similarity: Float32[np.ndarray, "q k"]
  index: Int[np.ndarray, "q k"]


def neighbours(
  queries: Float32[np.ndarray, "q d"],
  bank: Float32[np.ndarray, "m d"],
  *,
  k: int,
  mesh: Mesh | None = None,
  block_bytes: int = 2**28,
) -> Neighbours:
  """The k rows of the bank with the largest dot product with each query.

  A running top k over blocks of the bank, for a block of queries at a time:
  of 50,000 x 1.28 million scores never more than a block exists. Scores are
  float32 at the highest matmul precision (a TPU's default rounds to bfloat16,
  which reorders neighbours).

  Args:
    queries: the same on every host.
    bank: the same on every host.
    k: at most the rows of the bank.
    mesh: queries are split over its data axes; one device by default.
    block_bytes: size of a device's largest block of scores, and of the bank's
      largest block.

  Raises:
    ValueError: for features that are not finite, or more neighbours than rows.
  """
  if not 1 <= k <= len(bank):
    raise ValueError(f"k={k} nearest of {len(bank)} rows; expected 1 to that")
  for name, rows in (("queries", queries), ("bank", bank)):
    # Of which a NaN or an infinity is one; without a copy of the bank.
    if not np.isfinite([rows.min(), rows.max()]).all():
      raise ValueError(
        f"the {name} are not all finite: the encoder diverged, or its weights "
        "are damaged"
      )
  mesh = mesh or make_mesh({"data": 1}, jax.local_devices()[:1])
  parts = num_batch_shards(mesh)
  columns = min(len(bank), 2**14, max(1, block_bytes // (4 * bank.shape[1])))
  rows = max(1, block_bytes // (4 * (columns + k)))
  rows = parts * min(rows, -(-len(queries) // parts))
  found = []
  for start in range(0, len(queries), rows):
    block = queries[start : start + rows]
    # Padded, so that only one shape is compiled.
    padded = np.pad(block, ((0, rows - len(block)), (0, 0)))
    values, index = _search(padded, bank, k, columns, mesh)
    found.append((values[: len(block)], index[: len(block)]))
  values, index = zip(*found, strict=True)
  return Neighbours(np.concatenate(values), np.concatenate(index))


def predict(
  found: Neighbours,
  labels: Int[np.ndarray, " m"],
  *,
  ks: Sequence[int],
  classes: int,
  temperature: float = 0.07,
) -> dict[int, Int[np.ndarray, " q"]]:
  """By k, the class with the most weight; the lowest one of equals.

  Args:
    found: of each query, at least the largest k of `ks`.
    labels: of the bank.
    ks: numbers of neighbours that vote.
    classes: how many there are.
    temperature: of the softmax.
  """
  largest = max(ks)
  scores = found.similarity[:, :largest].astype(np.float64)
  weights = np.exp((scores - scores[:, :1]) / temperature)
  weights /= weights.sum(axis=1, keepdims=True)
  votes = labels[found.index[:, :largest]]
  count = len(scores)
  # A block of queries at a time: 50,000 x 1,000 sums are 400 MB.
  rows = max(1, 2**24 // classes)
  out = {}
  for k in ks:
    each = [
      np.argmax(
        _sums(weights[s : s + rows, :k], votes[s : s + rows, :k], classes),
        axis=1,
      )
      for s in range(0, count, rows)
    ]
    out[k] = np.concatenate(each).astype(np.int32)
  return out


def _sums(
  weights: Float[np.ndarray, "q k"], votes: Int[np.ndarray, "q k"], classes: int
) -> Float[np.ndarray, "q c"]:
  place = np.arange(len(votes))[:, None] * classes + votes
  sums = np.bincount(
    place.ravel(), weights.ravel(), minlength=len(votes) * classes
  )
  return sums.reshape(len(votes), classes)


def _search(
  queries: np.ndarray, bank: np.ndarray, k: int, columns: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
  """Of a block of queries, over all blocks of the bank."""
  merge = _merge(mesh)
  state = probe.shard_batch(
    {
      "queries": queries,
      "values": np.full((len(queries), k), -np.inf, np.float32),
      "index": np.zeros((len(queries), k), np.int32),
    },
    mesh,
  )
  values, index = state["values"], state["index"]
  for start in range(0, len(bank), columns):
    block = bank[start : start + columns]
    limits = np.asarray([start, len(bank)], np.int32)
    block = np.pad(block, ((0, columns - len(block)), (0, 0)))
    block, limits = probe.replicate((block, limits), mesh)
    values, index = merge(values, index, state["queries"], block, limits)
  return _gather(values, mesh), _gather(index, mesh)


@functools.lru_cache(maxsize=8)
def _merge(mesh: Mesh):
  """The compiled step of the search; each device searches its own queries."""

  def merge(values, index, queries, block, limits):
    k = values.shape[1]
    scores = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
    # The order of top_k has -0.0 below 0.0, and for us they are equal.
    scores = jnp.where(scores == 0, 0.0, scores)
    place = limits[0] + jnp.arange(block.shape[0], dtype=jnp.int32)
    scores = jnp.where(place < limits[1], scores, -jnp.inf)
    # Earlier rows stand first, and of equal ones top_k takes the first.
    values, chosen = jax.lax.top_k(jnp.concatenate([values, scores], 1), k)
    earlier = jnp.take_along_axis(index, jnp.minimum(chosen, k - 1), axis=1)
    index = jnp.where(chosen < k, earlier, limits[0] + chosen - k)
    return values, index

  rows, whole = BATCH_SPEC, PartitionSpec()
  return jax.jit(
    jax.shard_map(
      merge,
      mesh=mesh,
      in_specs=(rows, rows, rows, whole, whole),
      out_specs=(rows, rows),
    ),
    donate_argnums=(0, 1),
  )


def _gather(x: jax.Array, mesh: Mesh) -> np.ndarray:
  """All rows, on every host."""
  if jax.process_count() > 1:
    x = jax.jit(lambda y: y, out_shardings=replicated_sharding(mesh))(x)
  return np.asarray(x)
