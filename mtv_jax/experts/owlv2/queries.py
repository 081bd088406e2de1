"""Cache of query embeddings on the devices.

Of the n-grams of captions many come again and again, and a closed vocabulary
never changes: its text tower runs before the first image.

What a phrase's query is must not depend on what was asked for before it. So
the text tower always runs on `TEXTS` phrases a device, none of which touches
another, however few of them are new.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, PyTree

from mtv_jax.experts import local_mesh
from mtv_jax.parallel.mesh import num_batch_shards, replicated_sharding

# Phrases a device in a run of the text tower: of 16 tokens each, as many rows
# as a TPU needs to be busy with more than reading the weights.
TEXTS = 16
# Phrases remembered: of 512 channels, 32 MB on each device.
CAPACITY = 16_384


class Queries:
  """A table of queries on every device of a mesh.

  One thread at a time may use it.

  Args:
    embed: parameters and tokens `[n, k, t]` to queries `[n, e]`, by row.
    params: of `embed`, on the devices.
    width: e.
    mesh: of this host.
    capacity: phrases remembered; a single request for more enlarges it.
  """

  def __init__(
    self,
    embed: Callable[[PyTree, Array], Array],
    params: Any,
    *,
    width: int,
    mesh: Mesh,
    capacity: int = CAPACITY,
  ):
    self._params, self._mesh = params, mesh
    self._embed = local_mesh.jit_per_device(
      lambda params, rows: embed(params, rows["tokens"]), mesh
    )
    self._write = jax.jit(
      lambda table, slots, new: table.at[slots].set(new, mode="drop"),
      out_shardings=replicated_sharding(mesh),
    )
    self._table = local_mesh.replicate(
      np.zeros((capacity, width), np.float32), mesh
    )
    # By the bytes of its tokens, the one asked for last at the end.
    self._slots: collections.OrderedDict[bytes, int] = collections.OrderedDict()
    self.encoded = 0

  @property
  def table(self) -> Float32[Array, "capacity e"]:
    """The queries, to be read with what `find` gave before anything else."""
    return self._table

  def find(
    self, tokens: Int32[np.ndarray, "*n k t"]
  ) -> Int32[np.ndarray, "*n"]:
    """Where each phrase's query is in `table`; -1 for one whose ids are 0.

    Args:
      tokens: of each phrase, in each of k prompts.
    """
    lead = tokens.shape[:-2]
    rows = tokens.reshape(-1, *tokens.shape[-2:])
    there = rows.any(axis=(1, 2))
    keys = [row.tobytes() for row in rows]
    wanted = {key: i for i, key in reversed(list(enumerate(keys))) if there[i]}
    new = []
    for key, i in sorted(wanted.items(), key=lambda item: item[1]):
      if key in self._slots:
        self._slots.move_to_end(key)
      else:
        new.append((key, i))
    self._reserve(len(wanted))
    count = num_batch_shards(self._mesh) * TEXTS
    for start in range(0, len(new), count):
      self._encode(rows, new[start : start + count], count)
    slots = [
      self._slots[k] if t else -1 for k, t in zip(keys, there, strict=True)
    ]
    return np.array(slots, np.int32).reshape(lead)

  def _reserve(self, count: int) -> None:
    """Makes the table large enough for a request."""
    capacity = len(self._table)
    if count > capacity:
      capacity = 1 << (count - 1).bit_length()
      more = ((0, capacity - len(self._table)), (0, 0))
      self._table = local_mesh.replicate(jnp.pad(self._table, more), self._mesh)

  def _encode(
    self, rows: np.ndarray, new: list[tuple[bytes, int]], count: int
  ) -> None:
    """Runs the text tower on some phrases, in the place of forgotten ones."""
    capacity = len(self._table)
    tokens = np.zeros((count, *rows.shape[1:]), np.int32)
    slots = np.full(count, capacity, np.int32)  # Beyond the table: nowhere.
    for place, (key, i) in enumerate(new):
      slot = len(self._slots)
      if slot == capacity:
        _, slot = self._slots.popitem(last=False)
      self._slots[key] = slot
      tokens[place], slots[place] = rows[i], slot
    placed = local_mesh.shard({"tokens": tokens}, self._mesh)
    found = self._embed(self._params, placed)
    self._table = self._write(self._table, slots, found)
    self.encoded += len(new)
