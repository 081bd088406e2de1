"""The device mesh and the sharding of batches over it.

Three axes: `data` (replicas), `fsdp` (the batch and the parameters), `tensor`
(heads and hidden units). The batch is split over `data` and `fsdp` together.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from mtv_jax.config import sections
from mtv_jax.utils.errors import ConfigError, did_you_mean

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))


@dataclasses.dataclass(frozen=True)
class MeshAxes:
  """A number for each axis; -1 for what the others leave."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class MeshConfig(MeshAxes):
  """`config.mesh`; see `make_mesh`."""

  dcn: MeshAxes = MeshAxes()  # Parts of an axis that lie on different slices.


_DEFAULT_DCN = sections.to_dict(MeshAxes())


def make_mesh(
  shape: MeshConfig | Mapping[str, Any], devices: Sequence[Any] | None = None
) -> Mesh:
  """The mesh `(data, fsdp, tensor)`.

  `dcn` is the number of slices along each axis, between which the network is
  slow, as MaxText's `dcn_data_parallelism` and axlearn's `HybridMeshShape`: of
  512 chips in two slices, `dict(data=128, fsdp=4, dcn=dict(data=2))` has 64 x 4
  on each. By default `data` is split over all slices, so that only reductions
  of gradients cross that network, then `fsdp`, then `tensor`.

  Args:
    shape: sizes by axis over all devices; -1 for what the others leave. And
      `dcn`, by axis: -1 for all slices that the others leave. Devices without
      slices are cut into as many groups, in order.
    devices: `jax.Device`s or stand-ins; all by default.

  Raises:
    ConfigError: for an unknown axis, or sizes that don't multiply to the
      number of devices, or of slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = sections.to_dict(shape)
  sizes = {name: size for name, size in shape.items() if name != "dcn"}
  whole = _sizes("config.mesh", sizes, len(devices), "devices")
  slices = _slices(devices)
  given = {**_DEFAULT_DCN, **(shape.get("dcn") or {})}
  if len(slices) == 1:
    # Devices without slices can be cut into some by the config.
    slices = _cut(devices, math.prod(abs(int(n)) for n in given.values()))
  if given == _DEFAULT_DCN:
    # The first axes take the most.
    outer, rest = [], len(slices)
    for size in whole[:-1]:
      outer.append(math.gcd(size, rest))
      rest //= outer[-1]
    outer = (*outer, rest)
  else:
    outer = _sizes("config.mesh.dcn", given, len(slices), "slices")
  for name, size, parts in zip(MESH_AXES, whole, outer, strict=True):
    if size % parts:
      raise ConfigError(
        f"config.mesh: {name}={size} can't lie on dcn.{name}={parts} slices in "
        f"equal parts. Take a multiple of {parts}, or split another axis over "
        f"the slices, such as dcn=dict(data=1, fsdp={len(slices)})."
      )
  inner = tuple(n // parts for n, parts in zip(whole, outer, strict=True))
  # Within a slice, JAX orders the devices by its network. `jax.make_mesh` may
  # split an axis of the network on v5e alone.
  blocks = [
    mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
    for part in slices
  ]
  grid = np.stack(blocks).reshape(*outer, *inner)
  # Per axis, first the slice, then the index within it.
  grid = grid.transpose(0, 3, 1, 4, 2, 5).reshape(whole)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _sizes(
  where: str, shape: Mapping[str, int], count: int, unit: str
) -> tuple[int, ...]:
  """Sizes of all axes, which multiply to `count`, with -1 filled in."""
  for name in shape:
    if name not in MESH_AXES:
      raise ConfigError(
        f"{where}: no axis {name!r}. {did_you_mean(name, MESH_AXES)}"
      )
  sizes = [int(shape.get(name, 1)) for name in MESH_AXES]
  wrong = ConfigError(
    f"{where}: {dict(zip(MESH_AXES, sizes, strict=True))} does not divide "
    f"{count} {unit}. The sizes must multiply to their number; one may be -1."
  )
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise wrong
  if -1 in sizes:
    sizes[sizes.index(-1)] = count // -math.prod(sizes)
  if math.prod(sizes) != count:
    raise wrong
  return tuple(sizes)


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
  slices = collections.defaultdict(list)
  for device in devices:
    slices[getattr(device, "slice_index", None) or 0].append(device)
  sizes = [len(part) for part in slices.values()]
  if len(set(sizes)) > 1:
    raise ConfigError(f"the slices have {sizes} devices, expected equal sizes.")
  return [slices[index] for index in sorted(slices)]


def _cut(devices: Sequence[Any], count: int) -> list[Sequence[Any]]:
  """Consecutive groups of devices."""
  if count > 1 and getattr(devices[0], "platform", "") == "tpu":
    raise ConfigError(
      f"config.mesh.dcn gives {count} slices, but these {len(devices)} chips "
      "are one. Leave dcn out."
    )
  if count < 1 or len(devices) % count:
    raise ConfigError(
      f"config.mesh.dcn gives {count} slices, which don't divide "
      f"{len(devices)} devices."
    )
  size = len(devices) // count
  return [devices[i * size : (i + 1) * size] for i in range(count)]


def num_batch_shards(mesh: Mesh) -> int:
  """The number of parts that the batch is split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises ConfigError if the mesh does not divide the batch."""
  parts = num_batch_shards(mesh)
  if batch_size % parts:
    below = batch_size // parts * parts
    near = f"{below} or {below + parts}" if below else f"{parts}"
    raise ConfigError(
      f"config.batch_size is {batch_size}, which data x fsdp = "
      f"{mesh.shape['data']} x {mesh.shape['fsdp']} does not divide. Take "
      f"{near}, or another config.mesh."
    )


class HostRows(NamedTuple):
  """Which part of each global batch this process reads: `index` of `count`."""

  index: int
  count: int


def host_rows(mesh: Mesh) -> HostRows:
  """The part of a global batch that goes to this process's devices."""
  parts = _parts(mesh)
  for i, (_, processes) in enumerate(parts):
    if jax.process_index() in processes:
      return HostRows(index=i, count=len(parts))
  raise ConfigError(
    f"config.mesh: process {jax.process_index()} has no device on the mesh of "
    f"{mesh.size} devices, and so no rows to read."
  )


def data_rows(batch_size: int, mesh: Mesh) -> Int[np.ndarray, " b"]:
  """For each row of a batch on the mesh, which row of the data it is.

  Processes read consecutive rows, but the devices of a process need not be
  consecutive on the mesh: on 4 x 4 chips in hosts of 2 x 2, the first row of
  chips belongs to two hosts. A batch on the mesh is then a permutation of the
  data's; random numbers of an example follow its row of the data.
  """
  size = batch_size // num_batch_shards(mesh)
  shards = np.concatenate([shards for shards, _ in _parts(mesh)])
  rows = np.empty((len(shards), size), np.int32)
  rows[shards] = np.arange(batch_size).reshape(len(shards), size)
  return rows.reshape(-1)


def _parts(mesh: Mesh) -> list[tuple[tuple[int, ...], set[int]]]:
  """(shards of the batch, processes that hold them), by the first shard."""
  holders = collections.defaultdict(set)
  devices = mesh.devices.reshape(num_batch_shards(mesh), -1)
  for shard, row in enumerate(devices):
    for device in row:
      holders[device.process_index].add(shard)
  processes = collections.defaultdict(set)
  for process, shards in holders.items():
    processes[tuple(sorted(shards))].add(process)
  sizes = [len(shards) for shards in processes]
  if len(set(sizes)) > 1 or sum(sizes) != len(devices):
    raise ConfigError(
      f"config.mesh: {len(holders)} processes would hold {sizes} of the "
      f"{len(devices)} shards of the batch, which are not separate equal "
      "parts. Make data x fsdp a multiple of the number of processes."
    )
  return sorted(processes.items())


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def shard_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Global arrays of this process's rows of a batch; see `data_rows`."""
  sharding = NamedSharding(mesh, BATCH_SPEC)
  return {
    name: jax.make_array_from_process_local_data(sharding, value)
    for name, value in batch.items()
  }


def put_array(value: Any, sharding: NamedSharding) -> jax.Array:
  """The global array of an array that every host holds in full."""
  value = np.asarray(value)
  return jax.make_array_from_callback(
    value.shape, sharding, lambda index: value[index]
  )


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
  """Replicates arrays over the devices of the mesh."""
  sharding = replicated_sharding(mesh)
  return jax.tree.map(lambda leaf: put_array(leaf, sharding), tree)


def shard_replicated(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Shards a batch that every host holds in full over the mesh, by rows.

  An array whose rows the data axes do not divide is replicated.
  """
  parts, sharded = num_batch_shards(mesh), NamedSharding(mesh, BATCH_SPEC)

  def put(value: np.ndarray) -> jax.Array:
    splits = np.ndim(value) and len(value) % parts == 0
    return put_array(value, sharded if splits else replicated_sharding(mesh))

  return {name: put(value) for name, value in batch.items()}
