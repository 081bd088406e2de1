"""Data parallelism of an expert over the devices of one host.

Hosts label different shards and never wait for one another, so an expert's mesh
has only this host's devices. All devices run one program with equally many
rows: labels are bit-identical for any number of devices and hosts.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from mtv_jax.parallel.mesh import (
  BATCH_SPEC,
  MESH_AXES,
  check_batch_size,
  replicated_sharding,
)
from mtv_jax.utils import xla_flags


def make_local_mesh() -> Mesh:
  """Makes a `(data, fsdp, tensor)` mesh with this host's devices on `data`."""
  # `make_mesh` may reject the topology of a single host's devices.
  devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
  return Mesh(devices, MESH_AXES)


def is_accelerator(mesh: Mesh) -> bool:
  """Whether the devices of a mesh are GPUs or TPUs."""
  return mesh.devices.flat[0].platform != "cpu"


def fill_defaults(
  mesh: Mesh | None, dtype: str | None, batch_size: int | None
) -> tuple[Mesh, str, int]:
  """Replaces None with defaults; `batch_size` is images per device.

  Defaults: `make_local_mesh()`; bfloat16 and 16 images on accelerators, float32
  and 1 image on CPUs.
  """
  mesh = make_local_mesh() if mesh is None else mesh
  defaults = ("bfloat16", 16) if is_accelerator(mesh) else ("float32", 1)
  return mesh, dtype or defaults[0], batch_size or defaults[1]


def replicate(params: PyTree, mesh: Mesh) -> PyTree:
  """Copies parameters to every device of a local mesh."""
  return jax.device_put(params, replicated_sharding(mesh))


def shard(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Shards arrays `[rows, ...]` over a local mesh, in order."""
  for value in arrays.values():
    check_batch_size("batch_size", len(value), mesh)
  return jax.device_put(dict(arrays), NamedSharding(mesh, BATCH_SPEC))


def jit_per_device(
  function: Callable[[PyTree, PyTree], PyTree], mesh: Mesh
) -> Callable[[PyTree, PyTree], PyTree]:
  """Compiles a function that each device applies to its own rows.

  It maps parameters (see `replicate`) and arrays `[n, ...]` (see `shard`) to
  arrays `[n, ...]`, row by row.
  """
  # With shard_map every device runs the single-device program.
  mapped = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=(PartitionSpec(), BATCH_SPEC),
    out_specs=BATCH_SPEC,
    check_vma=False,
  )
  return jax.jit(mapped, compiler_options=xla_flags.compiler_options(mesh))
