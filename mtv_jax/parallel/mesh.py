"""The device mesh, and the sharding of batches over it.

Three axes: `data` (replicas), `fsdp` (batch and parameters), `tensor` (heads
and hidden units). The batch is sharded over `data` and `fsdp` jointly.
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
  """Size of each axis; -1 infers it."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class MeshConfig(MeshAxes):
  """`config.mesh`; see `make_mesh`."""

  dcn: MeshAxes = MeshAxes()  # Number of slices along each axis.


_DEFAULT_DCN = sections.to_dict(MeshAxes())


def make_mesh(
  shape: MeshConfig | Mapping[str, Any], devices: Sequence[Any] | None = None
) -> Mesh:
  """Builds the mesh `(data, fsdp, tensor)`.

  `dcn` is the number of slices along each axis. A slow network connects slices,
  as in MaxText's `dcn_data_parallelism` and axlearn's `HybridMeshShape`. With
  512 chips in two slices, `dict(data=128, fsdp=4, dcn=dict(data=2))` has 64 x 4
  per slice. By default slices split `data`, so that only gradient reductions
  cross the slow network, then `fsdp`, then `tensor`.

  One axis size, and one of `dcn`, may be -1, which infers it. Devices without
  slices are grouped into slices in order.

  Raises:
    ConfigError: for an unknown axis, or sizes whose product is not the number
      of devices or slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = sections.to_dict(shape)
  sizes = {name: size for name, size in shape.items() if name != "dcn"}
  axis_sizes = _infer_sizes("config.mesh", sizes, len(devices), "devices")
  slices = _group_by_slice(devices)
  dcn_shape = {**_DEFAULT_DCN, **(shape.get("dcn") or {})}
  if len(slices) == 1:
    # `dcn` can group devices without slices.
    slices = _split(devices, math.prod(abs(int(n)) for n in dcn_shape.values()))
  if dcn_shape == _DEFAULT_DCN:
    # Greedy, from the first axis.
    outer, remaining = [], len(slices)
    for size in axis_sizes[:-1]:
      outer.append(math.gcd(size, remaining))
      remaining //= outer[-1]
    outer = (*outer, remaining)
  else:
    outer = _infer_sizes("config.mesh.dcn", dcn_shape, len(slices), "slices")
  for name, size, parts in zip(MESH_AXES, axis_sizes, outer, strict=True):
    if size % parts:
      raise ConfigError(
        f"config.mesh: {name}={size} can't be split over dcn.{name}={parts}."
      )
  inner = tuple(n // parts for n, parts in zip(axis_sizes, outer, strict=True))
  # JAX orders a slice's devices by its network. `jax.make_mesh` may split a
  # physical axis only on v5e.
  blocks = [
    mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
    for part in slices
  ]
  grid = np.stack(blocks).reshape(*outer, *inner)
  # Per axis: slice, then index within the slice.
  grid = grid.transpose(0, 3, 1, 4, 2, 5).reshape(axis_sizes)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _infer_sizes(
  where: str, shape: Mapping[str, int], count: int, unit: str
) -> tuple[int, ...]:
  """Sizes of all axes, with -1 inferred; their product is `count`."""
  for name in shape:
    if name not in MESH_AXES:
      suggestion = did_you_mean(name, MESH_AXES)
      raise ConfigError(f"{where}: no axis {name!r}. {suggestion}")
  sizes = [int(shape.get(name, 1)) for name in MESH_AXES]
  error = ConfigError(
    f"{where}: expected sizes that multiply to {count} {unit}, one of them may"
    f" be -1, got {dict(zip(MESH_AXES, sizes, strict=True))}."
  )
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise error
  if -1 in sizes:
    sizes[sizes.index(-1)] = count // -math.prod(sizes)
  if math.prod(sizes) != count:
    raise error
  return tuple(sizes)


def _group_by_slice(devices: Sequence[Any]) -> list[list[Any]]:
  slices = collections.defaultdict(list)
  for device in devices:
    slices[getattr(device, "slice_index", None) or 0].append(device)
  sizes = [len(part) for part in slices.values()]
  if len(set(sizes)) > 1:
    raise ConfigError(f"the slices have {sizes} devices, expected equal sizes.")
  return [slices[index] for index in sorted(slices)]


def _split(devices: Sequence[Any], count: int) -> list[Sequence[Any]]:
  if count > 1 and getattr(devices[0], "platform", "") == "tpu":
    raise ConfigError("config.mesh.dcn: these chips form one slice. Drop it.")
  if count < 1 or len(devices) % count:
    raise ConfigError(
      f"config.mesh.dcn: {count} slices don't divide {len(devices)} devices."
    )
  size = len(devices) // count
  return [devices[i * size : (i + 1) * size] for i in range(count)]


def num_batch_shards(mesh: Mesh) -> int:
  """Number of shards of the batch."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(
  name: str, batch_size: int, mesh: Mesh, *, accumulate: int = 1
) -> None:
  """Raises ConfigError unless shards x `accumulate` divide `batch_size`."""
  parts = num_batch_shards(mesh) * accumulate
  if batch_size % parts:
    below = batch_size // parts * parts
    near = f"{below} or {below + parts}" if below else f"{parts}"
    raise ConfigError(
      f"{name} is {batch_size}, which data x fsdp x accumulate = {parts} does"
      f" not divide. Set it to {near}, or change the mesh."
    )


class HostRows(NamedTuple):
  """This process's part of each global batch: `index` of `count`."""

  index: int
  count: int


def find_host_rows(mesh: Mesh) -> HostRows:
  """This process's part of the global batch."""
  parts = _group_shards(mesh)
  for i, (_, processes) in enumerate(parts):
    if jax.process_index() in processes:
      return HostRows(index=i, count=len(parts))
  raise ConfigError(
    f"config.mesh leaves process {jax.process_index()} without a device."
  )


def data_rows(batch_size: int, mesh: Mesh) -> Int[np.ndarray, " b"]:
  """Data row of each row of a batch on the mesh.

  Processes read consecutive rows, but a process's devices may not be
  consecutive on the mesh (4 x 4 chips in hosts of 2 x 2): the batch on the mesh
  is then permuted. An example's random numbers follow its data row.
  """
  size = batch_size // num_batch_shards(mesh)
  shards = np.concatenate([shards for shards, _ in _group_shards(mesh)])
  rows = np.empty((len(shards), size), np.int32)
  rows[shards] = np.arange(batch_size).reshape(len(shards), size)
  return rows.reshape(-1)


def _group_shards(mesh: Mesh) -> list[tuple[tuple[int, ...], set[int]]]:
  """(batch shards, processes that hold them), by the first shard."""
  by_process = collections.defaultdict(set)
  devices = mesh.devices.reshape(num_batch_shards(mesh), -1)
  for shard, row in enumerate(devices):
    for device in row:
      by_process[device.process_index].add(shard)
  processes_by_shards = collections.defaultdict(set)
  for process, shards in by_process.items():
    processes_by_shards[tuple(sorted(shards))].add(process)
  sizes = [len(shards) for shards in processes_by_shards]
  if len(set(sizes)) > 1 or sum(sizes) != len(devices):
    raise ConfigError(
      f"config.mesh: {len(by_process)} processes would hold {sizes} shards of "
      "the batch: make data x fsdp a multiple of the number of processes."
    )
  return sorted(processes_by_shards.items())


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding that replicates an array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def shard_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Builds global arrays from each process's rows; see `data_rows`."""
  sharding = NamedSharding(mesh, BATCH_SPEC)
  return {
    name: jax.make_array_from_process_local_data(sharding, value)
    for name, value in batch.items()
  }


def put_array(value: Any, sharding: NamedSharding) -> jax.Array:
  """Builds a global array from an array that every host has in full."""
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
  """Shards a batch that every host has in full over the mesh, by rows.

  Replicates an array if the number of batch shards does not divide its rows.
  """
  parts, sharded = num_batch_shards(mesh), NamedSharding(mesh, BATCH_SPEC)

  def put(value: np.ndarray) -> jax.Array:
    splits = np.ndim(value) and len(value) % parts == 0
    return put_array(value, sharded if splits else replicated_sharding(mesh))

  return {name: put(value) for name, value in batch.items()}
