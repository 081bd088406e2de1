"""k-NN classification of frozen features (Wu et al. 2018; DINOv2's protocol).

With s_j the cosines of a test image with its K nearest training images, in
decreasing order, and K the largest k,

    w = softmax(s / T),   prediction_k = argmax_c  sum of w_j, j <= k, y_j = c

T = 0.07. Normalising over K instead of k leaves predictions unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float32, Int

from mtv_jax.config.options import PositiveFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.classification.probe_evaluators import (
  Evaluation,
  FeatureProbe,
  map_rows,
)
from mtv_jax.evals.core import bootstrap, ranking
from mtv_jax.evals.core.examples import Splits
from mtv_jax.parallel import mesh as mesh_lib
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class KNN(FeatureProbe):
  """k-NN classification: top-1 accuracy for each k.

  Each number of neighbours k is capped at the number of training images.
  """

  title = "k-NN classification"
  metric_pattern = r"top1_k\d+"

  k: tuple[PositiveInt, ...] = (10, 20, 100, 200)
  temperature: PositiveFloat = 0.07

  def _evaluate(self, encoder: Encoder, data: Splits) -> Evaluation:
    bank = normalize(self._features(encoder, data.train))
    queries = normalize(self._features(encoder, data.test))
    ks = sorted({min(k, len(bank)) for k in self.k})
    mesh = getattr(encoder, "mesh", None)
    neighbours = find_neighbours(queries, bank, k=ks[-1], mesh=mesh)
    options = {"classes": data.classes, "temperature": self.temperature}
    options["penalty"] = data.penalty
    predicted = predict(neighbours, data.train.labels, ks=ks, **options)
    hits = {f"top1_k{k}": p == data.test.labels for k, p in predicted.items()}
    return bootstrap.means(hits), {
      "feature": self.feature,
      "k": list(ks),
      "temperature": self.temperature,
      "weights_of_neighbours": f"softmax(cosine / temperature) over {ks[-1]}",
      "similarity": "cosine, float32, highest matmul precision",
      "ties": "neighbours and classes of equal score: lowest index first",
    }


class Neighbours(NamedTuple):
  """Dot products and indices of the nearest bank rows, nearest first.

  Ties go to the lower index.
  """

  similarity: Float32[np.ndarray, "q k"]
  index: Int[np.ndarray, "q k"]


def find_neighbours(
  queries: Float32[np.ndarray, "q d"],
  bank: Float32[np.ndarray, "m d"],
  *,
  k: int,
  mesh: Mesh | None = None,
  block_bytes: int = 2**28,
) -> Neighbours:
  """The k bank rows with the largest dot product with each query.

  Blockwise running top-k: of 50,000 x 1.28 million scores, one block is in
  memory at a time. Scores are float32 at the highest matmul precision (the TPU
  default rounds to bfloat16, which reorders neighbours).
  """
  if not 1 <= k <= len(bank):
    raise InputError(f"k={k}; expected 1 to the bank's {len(bank)} rows")
  ranking.check_finite(queries=queries, bank=bank)
  mesh = mesh or mesh_lib.make_mesh({"data": 1}, jax.local_devices()[:1])
  shards = mesh_lib.num_batch_shards(mesh)
  columns = min(len(bank), 2**14, max(1, block_bytes // (4 * bank.shape[1])))
  rows = max(1, block_bytes // (4 * (columns + k)))
  rows = shards * min(rows, -(-len(queries) // shards))
  blocks = []
  for start in range(0, len(queries), rows):
    block = queries[start : start + rows]
    # Padded, so that only one shape is compiled.
    padded = np.pad(block, ((0, rows - len(block)), (0, 0)))
    top = _search_block(padded, bank, k, columns, mesh)
    blocks.append([x[: len(block)] for x in top])
  return Neighbours(*map(np.concatenate, zip(*blocks, strict=True)))


def _search_block(
  queries: np.ndarray, bank: np.ndarray, k: int, columns: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
  """Top-k similarities and indices of a block of queries."""
  merge = _merge_fn(mesh)
  values = np.full((len(queries), k), -np.inf, np.float32)
  state = {"values": values, "index": np.zeros(values.shape, np.int32)}
  state = mesh_lib.shard_replicated(state | {"queries": queries}, mesh)
  top = state["values"], state["index"]
  for start in range(0, len(bank), columns):
    block = bank[start : start + columns]
    limits = np.asarray([start, len(bank)], np.int32)
    block = np.pad(block, ((0, columns - len(block)), (0, 0)))
    block, limits = mesh_lib.replicate((block, limits), mesh)
    top = merge(*top, state["queries"], block, limits)
  if jax.process_count() > 1:
    # Gathers all rows on every host.
    replicated = mesh_lib.replicated_sharding(mesh)
    top = jax.jit(lambda x: x, out_shardings=replicated)(top)
  return jax.tree.map(np.asarray, top)


@functools.lru_cache(maxsize=8)
def _merge_fn(mesh: Mesh):
  """Compiled merge of a bank block into the top k; queries are sharded."""

  def merge(values, index, queries, block, limits):
    k = values.shape[1]
    scores = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
    # top_k orders -0.0 below 0.0; make them equal.
    scores = jnp.where(scores == 0, 0.0, scores)
    rows = limits[0] + jnp.arange(block.shape[0], dtype=jnp.int32)
    scores = jnp.where(rows < limits[1], scores, -jnp.inf)  # [q, rows]
    # Earlier rows come first; top_k breaks ties by position.
    values, positions = jax.lax.top_k(jnp.concatenate([values, scores], 1), k)
    earlier = jnp.take_along_axis(index, jnp.minimum(positions, k - 1), axis=1)
    index = jnp.where(positions < k, earlier, limits[0] + positions - k)
    return values, index

  rows, empty = mesh_lib.BATCH_SPEC, PartitionSpec()
  specs = {"in_specs": (rows,) * 3 + (empty,) * 2, "out_specs": (rows, rows)}
  sharded = jax.shard_map(merge, mesh=mesh, **specs)
  return jax.jit(sharded, donate_argnums=(0, 1))


def predict(
  neighbours: Neighbours,
  labels: Int[np.ndarray, " m"],
  *,
  ks: Sequence[int],
  classes: int,
  temperature: float = 0.07,
  penalty: Float32[np.ndarray, " c"] | float = 0.0,
) -> dict[int, Int[np.ndarray, " q"]]:
  """Predicted class by k; ties go to the lowest class.

  `neighbours` has at least max(ks) columns; `labels` are the bank's; `penalty`
  is added to the votes of the classes.
  """
  max_k = max(ks)
  scores = neighbours.similarity[:, :max_k].astype(np.float64)
  weights = np.exp((scores - scores[:, :1]) / temperature)
  weights /= weights.sum(axis=1, keepdims=True)
  votes = labels[neighbours.index[:, :max_k]]

  def vote(weights, votes):
    count = len(votes)
    cells = np.arange(count)[:, None] * classes + votes
    sums = np.bincount(cells.ravel(), weights.ravel(), count * classes)
    return np.argmax(sums.reshape(-1, classes) + penalty, axis=1)

  # A block of queries at a time: 50,000 x 1,000 sums are 400 MB.
  rows = max(1, 2**24 // classes)
  return {
    k: map_rows(vote, weights[:, :k], votes[:, :k], rows=rows).astype(np.int32)
    for k in ks
  }
