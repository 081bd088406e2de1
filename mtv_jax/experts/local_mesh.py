"""Experts on the devices of one host.

Hosts label different shards and never wait for each other, so a mesh of an
expert holds this host's devices only. Each of them runs the same program on
the same number of rows: a label depends neither on how many devices nor on how
many hosts there are, to the bit.
"""

from __future__ import annotations

import hashlib
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
from mtv_jax.utils.tree import flatten_with_names


def local_mesh() -> Mesh:
  """`(data, fsdp, tensor)` of this host's devices, all of them on `data`."""
  # In any order: they exchange nothing. One host's part of a pod need not be
  # what `make_mesh` takes for a whole machine.
  devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
  return Mesh(devices, MESH_AXES)


def replicate(params: PyTree, mesh: Mesh) -> PyTree:
  """Parameters, whole on every device of a mesh of this host."""
  return jax.device_put(params, replicated_sharding(mesh))


def rows(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Arrays `[rows, ...]` cut over a mesh of this host, in order.

  Raises:
    ConfigError: the devices don't divide the rows.
  """
  for value in arrays.values():
    check_batch_size(len(value), mesh)
  return jax.device_put(dict(arrays), NamedSharding(mesh, BATCH_SPEC))


def by_device(
  function: Callable[[PyTree, PyTree], PyTree], mesh: Mesh
) -> Callable[[PyTree, PyTree], PyTree]:
  """Compiles a function to run on each device with that device's rows.

  jit compiles it once more for every shape of the rows.

  Args:
    function: from parameters and arrays `[n, ...]` to arrays `[n, ...]`, no
      row of which depends on another.
    mesh: of this host.

  Returns:
    The function of what `replicate` and `rows` give.
  """
  # Not left to the partitioner: what each device runs is then the program of
  # one device, by construction.
  cut = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=(PartitionSpec(), BATCH_SPEC),
    out_specs=BATCH_SPEC,
    check_vma=False,
  )
  return jax.jit(cut, compiler_options=xla_flags.compiler_options(mesh))


def fingerprint(params: PyTree) -> str:
  """A hash of parameters: of names, types, shapes and numbers."""
  digest = hashlib.blake2b(digest_size=8)
  for name, leaf in flatten_with_names(params):
    value = np.ascontiguousarray(leaf)
    digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
    digest.update(value.data)
  return digest.hexdigest()
