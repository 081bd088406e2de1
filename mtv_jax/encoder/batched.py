"""Running a compiled function over many items, on every host of a pod."""

from __future__ import annotations

import collections
import concurrent.futures
import os
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from mtv_jax.parallel import sharding


def in_batches(
  function: Callable[[PyTree], dict[str, jax.Array]],
  prepare: Callable[[int], PyTree],
  *,
  count: int,
  blank: PyTree,
  batch_size: int,
  mesh: Mesh,
) -> dict[str, np.ndarray]:
  """`function` of items 0..count-1, in batches sharded over the mesh.

  Every host runs the same number of batches, prepares the rows that its own
  devices hold, and gets all the results. While the devices work on one batch,
  threads prepare the next one and the results of the one before are fetched.

  Args:
    function: from `[B, ...]`, one array or a tree of them, to a dictionary of
      `[B, ...]`, each replicated over the mesh.
    prepare: item number to one row; called from several threads.
    count: how many items, at least 1.
    blank: what a padding row holds; its structure, shapes and types are every
      row's.
    batch_size: rows a batch over the whole mesh; see `padded_batch`.
    mesh: `(data, fsdp, tensor)`.

  Returns:
    By name, the results of all items in order; padding is dropped.
  """
  size = padded_batch(count, batch_size, sharding.batch_shards(mesh))
  placing = NamedSharding(mesh, sharding.BATCH)
  rows = _local_rows(placing, size)
  results = collections.defaultdict(list)

  def collect(out: dict[str, jax.Array], start: int) -> None:
    for name, value in out.items():
      results[name].append(np.asarray(value)[: count - start])

  def place(array: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(
      array.shape, placing, lambda index: array[index]
    )

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

    def submit(start: int) -> dict[int, tuple[int, concurrent.futures.Future]]:
      items = {row: start + row for row in rows if start + row < count}
      return {row: (i, pool.submit(prepare, i)) for row, i in items.items()}

    ready, running = submit(0), None
    for start in range(0, count, size):
      batch = _assemble(ready, blank, size)
      ready = submit(start + size)
      out = function(jax.tree.map(place, batch))
      if running:
        collect(*running)
      running = (out, start)
    collect(*running)
  return {name: np.concatenate(parts) for name, parts in results.items()}


def padded_batch(count: int, batch_size: int, shards: int) -> int:
  """The batch size that is compiled for.

  `batch_size`, or for a shorter list the power of two that it fits in (a
  handful of shapes to compile, and one image doesn't cost a batch of 64),
  rounded up to what the mesh divides.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}; expected at least 1")
  if count < batch_size:
    batch_size = min(batch_size, 1 << (count - 1).bit_length())
  return -(-batch_size // shards) * shards


def _local_rows(placing: NamedSharding, size: int) -> list[int]:
  indices = placing.addressable_devices_indices_map((size,)).values()
  return sorted({r for i in indices for r in range(*i[0].indices(size))})


def _assemble(
  pending: Mapping[int, tuple[int, concurrent.futures.Future]],
  blank: PyTree,
  size: int,
) -> PyTree:
  batch = jax.tree.map(lambda x: np.repeat(x[None], size, axis=0), blank)
  for row, (index, future) in pending.items():
    try:
      item = future.result()
    except Exception as error:
      # The file's name is in the error already; this is its place in the list.
      error.add_note(f"(while preparing item {index})")
      for _, other in pending.values():
        other.cancel()
      raise
    for whole, part in zip(
      jax.tree.leaves(batch), jax.tree.leaves(item), strict=True
    ):
      whole[row] = part
  return batch
