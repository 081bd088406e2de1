"""The mesh, the rules that shard parameters over it, and placing arrays.

Three axes: `data` (replicas), `fsdp` (the batch and the parameters), `tensor`
(heads and hidden units). The batch is split over `data` and `fsdp` together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from mtv_jax import config as config_lib
from mtv_jax import trees

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# (regex over names, axis of each trailing dimension); the first match wins.
# Column-parallel into a block, row-parallel out of it, so that one all-reduce
# a sublayer is all that `tensor` costs (Shoeybi et al. 2019, Megatron-LM). QKV
# columns are ordered by head, so that a slice holds whole heads.
Rules = Sequence[tuple[str, Sequence[str | None]]]
RULES: Rules = (
  (r"attention/(qkv|q|kv)/kernel$", ("fsdp", "tensor")),
  (r"attention/(qkv|q|kv)/bias$", ("tensor",)),
  (r"attention/out/kernel$", ("tensor", "fsdp")),
  (r"mlp/fc1/kernel$", ("fsdp", "tensor")),
  (r"mlp/fc1/bias$", ("tensor",)),
  (r"mlp/fc2/kernel$", ("tensor", "fsdp")),
  (r"(patch_embed/kernel|token_embedding)$", (None, "fsdp")),
  (r"projection/kernel$", ("fsdp", None)),
  # DPT's convolutions: `[height, width, in, out]`.
  (r"(resize\d?|lateral\d|conv\d)/kernel$", (None, "fsdp")),
  # Prototypes, of the self-distillation heads.
  (r"last_layer/kernel$", (None, "tensor")),
  (r"last_layer/scale$", ("tensor",)),
  (r"", ()),
)


def make_mesh(
  shape: config_lib.Config, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh `(data, fsdp, tensor)`.

  Args:
    shape: sizes by axis; one of them may be -1 for "what is left".
    devices: defaults to all.

  Raises:
    ConfigError: for an unknown axis, or sizes that don't multiply to the
      number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  for name in shape:
    if name not in AXES:
      raise config_lib.ConfigError(
        f"config.mesh: no axis {name!r}. {config_lib.did_you_mean(name, AXES)}"
      )
  sizes = [int(shape.get(name, 1)) for name in AXES]
  wrong = config_lib.ConfigError(
    f"config.mesh: {dict(zip(AXES, sizes, strict=True))} does not divide "
    f"{len(devices)} devices. The sizes must multiply to their number; one of "
    "them may be -1 for what the others leave."
  )
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise wrong
  known = math.prod(s for s in sizes if s != -1)
  if -1 in sizes:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise wrong
  return jax.make_mesh(
    tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def batch_shards(mesh: Mesh) -> int:
  """Over how many parts the batch is split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: Mesh) -> None:
  """Raises ConfigError where the mesh does not divide the batch."""
  parts = batch_shards(mesh)
  if batch_size % parts:
    below = batch_size // parts * parts
    raise config_lib.ConfigError(
      f"config.batch_size is {batch_size}, which data x fsdp = "
      f"{mesh.shape['data']} x {mesh.shape['fsdp']} does not divide. Take "
      f"{below or parts} or {below + parts}, or another config.mesh."
    )


@dataclasses.dataclass(frozen=True)
class HostRows:
  """Which part of each global batch this process reads: `index` of `count`."""

  index: int
  count: int


def host_rows(batch_size: int, mesh: Mesh) -> HostRows:
  """The rows of a global batch that this process's devices hold.

  Raises:
    ConfigError: if they are not one equal, contiguous part.
  """
  sharding = NamedSharding(mesh, BATCH)
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  rows = set()
  for index in indices:
    rows.update(range(*index[0].indices(batch_size)))
  start, size = min(rows), len(rows)
  if max(rows) - start + 1 != size or batch_size % size or start % size:
    raise config_lib.ConfigError(
      f"config.mesh: process {jax.process_index()} would hold rows "
      f"{sorted(rows)[:8]}... of the batch, which are not one contiguous part. "
      "Make data x fsdp a multiple of the number of processes."
    )
  return HostRows(index=start // size, count=batch_size // size)


def _fit(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh):
  """A rule's axes for one array: trailing dimensions, whole where uneven.

  A dimension that its axis does not divide stays whole: a vocabulary of 258 is
  not an error.
  """
  if len(axes) > len(shape):
    axes = ()
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
  return PartitionSpec(
    *(
      axis if axis and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(axes, shape, strict=True)
    )
  )


def tree_shardings(tree: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
  """Shardings for a tree of arrays or shapes, by the names of its leaves.

  Optimizer moments, the teacher and the EMA end in the parameters' own names,
  so they fall under the same rules and are sharded with the parameters.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    mesh: from `make_mesh`.
    rules: the config's own, tried before the built-in ones.
  """
  every = [*rules, *RULES]

  def place(name, leaf):
    axes = trees.first_match(name, every)
    return NamedSharding(mesh, _fit(axes, leaf.shape, mesh))

  return trees.map_with_names(place, tree)


def check_rules(rules: Rules, names: Iterable[str]) -> None:
  """Raises ValueError for a rule of the config that matches no parameter.

  And for axes that the mesh does not have.
  """
  trees.match_rules(names, rules, what="config.sharding")
  for pattern, axes in rules:
    for axis in axes:
      if axis is not None and axis not in AXES:
        raise config_lib.ConfigError(
          f"config.sharding: {pattern!r} names the axis {axis!r}. "
          f"{config_lib.did_you_mean(str(axis), AXES)}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def place_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Makes global arrays of this process's rows of a batch."""
  sharding = NamedSharding(mesh, BATCH)
  return {
    name: jax.make_array_from_process_local_data(sharding, value)
    for name, value in batch.items()
  }


def table(abstract: PyTree) -> list[tuple[str, tuple[int, ...], str, int]]:
  """Rows (name, shape, partition, bytes a device) for the start-up log."""
  rows = []
  for name, leaf in trees.flatten_names(abstract):
    local = leaf.sharding.shard_shape(leaf.shape)
    size = math.prod(local) * np.dtype(leaf.dtype).itemsize
    rows.append((name, tuple(leaf.shape), str(leaf.sharding.spec), size))
  return rows
