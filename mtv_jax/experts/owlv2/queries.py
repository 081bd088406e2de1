"""Cache of query embeddings on the devices.

Many n-grams of captions recur, and a fixed vocabulary never changes. The text
tower always runs on a fixed number of independent rows, so that a query does
not depend on earlier requests.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, PyTree

from mtv_jax.experts import local_mesh
from mtv_jax.parallel.mesh import replicated_sharding

# Phrases per device and run of the text tower: with 16 tokens each, enough that
# reading weights is not the bottleneck of a TPU.
_BATCH_SIZE = 16
# Number of cached phrases: 32 MB per device at 512 channels.
_CAPACITY = 16_384


class QueryCache:
  """A table of queries on every device of a mesh; not thread-safe.

  `embed` maps `params` (on the devices) and tokens `[n, k, t]` to queries
  `[n, width]`, row by row. Requests for more than `capacity` phrases grow it.
  """

  def __init__(
    self,
    embed: Callable[[PyTree, Array], Array],
    params: Any,
    *,
    width: int,
    mesh: Mesh,
    capacity: int = _CAPACITY,
  ):
    self._params, self._mesh = params, mesh
    self._embed = local_mesh.jit_per_device(
      lambda params, rows: embed(params, rows["tokens"]), mesh
    )
    self._write = jax.jit(
      lambda table, slots, new: table.at[slots].set(new, mode="drop"),
      out_shardings=replicated_sharding(mesh),
    )
    # [capacity, e]; slots of `look_up` are valid until its next call.
    self.table: Float32[Array, "capacity e"] = local_mesh.replicate(
      np.zeros((capacity, width), np.float32), mesh
    )
    # Slots by the tokens' bytes, most recently used last.
    self._slots: collections.OrderedDict[bytes, int] = collections.OrderedDict()
    self.encoded = 0

  def look_up(
    self, tokens: Int32[np.ndarray, "*n k t"]
  ) -> Int32[np.ndarray, "*n"]:
    """Slot of each phrase's query in `table`; -1 for padding (all ids are 0).

    A phrase has t token ids in each of k prompts.
    """
    lead = tokens.shape[:-2]
    rows = tokens.reshape(-1, *tokens.shape[-2:])
    keys = [row.tobytes() if row.any() else None for row in rows]
    # First row of each phrase, in order.
    wanted = {key: i for i, key in reversed([*enumerate(keys)]) if key}
    new = []
    for key, i in sorted(wanted.items(), key=lambda item: item[1]):
      if key in self._slots:
        self._slots.move_to_end(key)
      else:
        new.append((key, i))
    if len(wanted) > len(self.table):
      capacity = 1 << (len(wanted) - 1).bit_length()
      more = ((0, capacity - len(self.table)), (0, 0))
      self.table = local_mesh.replicate(jnp.pad(self.table, more), self._mesh)
    count = self._mesh.size * _BATCH_SIZE
    for start in range(0, len(new), count):
      self._encode(rows, new[start : start + count], count)
    slots = [self._slots[key] if key else -1 for key in keys]
    return np.array(slots, np.int32).reshape(lead)

  def _encode(
    self, rows: np.ndarray, new: list[tuple[bytes, int]], count: int
  ) -> None:
    """Encodes phrases into free or least recently used slots."""
    capacity = len(self.table)
    tokens = np.zeros((count, *rows.shape[1:]), np.int32)
    slots = np.full(count, capacity, np.int32)  # Out of range: not written.
    for row, (key, i) in enumerate(new):
      slot = len(self._slots)
      if slot == capacity:
        _, slot = self._slots.popitem(last=False)
      self._slots[key] = slot
      tokens[row], slots[row] = rows[i], slot
    sharded = local_mesh.shard({"tokens": tokens}, self._mesh)
    queries = self._embed(self._params, sharded)
    self.table = self._write(self.table, slots, queries)
    self.encoded += len(new)
