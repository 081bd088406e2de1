"""Batched multi-host inference with a jitted function."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float32, PyTree

from mtv_jax.parallel.mesh import BATCH_SPEC, num_batch_shards, put_array
from mtv_jax.parallel.rules import tree_shardings
from mtv_jax.utils import progress
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.threads import available_cores


def in_batches(
  function: Callable[[PyTree], dict[str, jax.Array]],
  prepare: Callable[[int], PyTree],
  *,
  count: int,
  blank: PyTree,
  batch_size: int,
  mesh: Mesh,
) -> dict[str, np.ndarray]:
  """Runs `function` on items 0..count-1, in batches sharded over the mesh.

  `prepare` maps an item's index to its row and runs in threads; `blank` is a
  padding row. `function` maps a tree of `[B, ...]` to replicated `[B, ...]`.
  Every host prepares the rows of its own devices and returns all results. On
  several hosts a row gets consecutive items, batch after batch, so that each
  host reads one part of the data. While the devices compute a batch, threads
  prepare the next one, and the host fetches the previous results.
  """
  size = padded_batch_size(count, batch_size, num_batch_shards(mesh))
  sharding = NamedSharding(mesh, BATCH_SPEC)
  indices = sharding.addressable_devices_indices_map((size,)).values()
  rows = sorted({r for i in indices for r in range(*i[0].indices(size))})
  steps = -(-count // size)
  items = np.arange(steps * size).reshape(steps, size)  # Blank from `count` on.
  if jax.process_count() > 1:
    row_ends = -(-np.arange(size + 1) * count // size)
    items = row_ends[:-1] + np.arange(steps)[:, None]
    items[items >= row_ends[1:]] = count
  results: dict[str, np.ndarray] = {}

  def collect(out: dict[str, jax.Array], step: int) -> None:
    valid = items[step] < count
    for name, value in out.items():
      if name not in results:
        results[name] = np.empty((count, *value.shape[1:]), value.dtype)
      results[name][items[step][valid]] = np.asarray(value)[valid]

  with concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:

    def submit(step: int) -> dict[int, tuple]:
      items_by_row = {row: int(items[step, row]) for row in rows}
      return {
        row: (i, pool.submit(prepare, i))
        for row, i in items_by_row.items()
        if i < count
      }

    pending, in_flight = submit(0), None
    for step in progress.track(range(steps), "encode", unit="batches"):
      batch = _assemble(pending, blank, size)
      pending = submit(step + 1) if step + 1 < steps else {}
      out = function(jax.tree.map(lambda x: put_array(x, sharding), batch))
      if in_flight:
        collect(*in_flight)
      in_flight = (out, step)
    collect(*in_flight)
  return results


def mesh_of(leaf: Any) -> Mesh | None:
  """The mesh of an array's sharding, if any."""
  sharding = getattr(leaf, "sharding", None)
  return sharding.mesh if isinstance(sharding, NamedSharding) else None


def put_params(params: Mapping[str, PyTree], mesh: Mesh) -> dict[str, PyTree]:
  """Shards leaves over the mesh, unless they are already on it."""

  def put(leaf, sharding):
    return leaf if mesh_of(leaf) == mesh else put_array(leaf, sharding)

  return jax.tree.map(put, dict(params), tree_shardings(params, mesh))


def padded_batch_size(count: int, batch_size: int, shards: int) -> int:
  """The compiled batch size, rounded up to a multiple of the mesh's shards.

  Short lists use the next power of two, which limits both the number of
  compiled shapes and the padding.
  """
  if batch_size < 1:
    raise InputError(f"batch_size={batch_size}; expected at least 1")
  if count < batch_size:
    batch_size = min(batch_size, 1 << (count - 1).bit_length())
  return -(-batch_size // shards) * shards


def _assemble(pending: Mapping[int, tuple], blank: PyTree, size: int) -> PyTree:
  """Fills a blank batch with `pending` rows: (index, future) by row."""
  batch = jax.tree.map(lambda x: np.repeat(x[None], size, axis=0), blank)
  for row, (index, future) in pending.items():
    try:
      item = future.result()
    except Exception as error:
      # The error names the file; the note adds the index.
      error.add_note(f"(while preparing item {index})")
      for _, other in pending.values():
        other.cancel()
      raise
    leaves = jax.tree.leaves(batch), jax.tree.leaves(item)
    for rows, value in zip(*leaves, strict=True):
      rows[row] = value
  return batch


class Padded(NamedTuple):
  """Ragged lists as one zero-padded array.

  `values` is padded to the longest list, rounded up to a power of two to limit
  the compiled shapes; `valid` to the longest list.
  """

  values: Float32[np.ndarray, "n k c"]
  valid: Bool[np.ndarray, "n m"]


def pad(lists: Sequence[Any], *, channels: int, what: str) -> Padded:
  """Pads finite lists `[m_i, channels]` to a common length of at least 1.

  Errors name a list by `what` and its index.
  """
  arrays = [np.asarray(item, np.float32) for item in lists]
  arrays = [x if x.size else x.reshape(0, channels) for x in arrays]
  for i, x in enumerate(arrays):
    if x.ndim != 2 or x.shape[1] != channels:
      raise InputError(f"{what} {i} must be [m, {channels}]; got {[*x.shape]}")
    if not np.isfinite(x).all():
      raise InputError(f"{what} {i} are not finite")
  longest = max([1, *map(len, arrays)])
  length = 1 << (longest - 1).bit_length()
  values = np.zeros((len(arrays), length, channels), np.float32)
  valid = np.zeros((len(arrays), longest), bool)
  for i, x in enumerate(arrays):
    values[i, : len(x)], valid[i, : len(x)] = x, True
  return Padded(values, valid)
