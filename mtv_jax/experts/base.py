"""Expert protocol, and data parallelism of an expert over one host's devices.

Hosts label different shards and never wait for one another, so an expert's mesh
has only this host's devices. All devices run one program with equally many
rows: labels are bit-identical for any number of devices and hosts.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, UInt8

from mtv_jax.config.options import build
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import Record
from mtv_jax.parallel.mesh import (
  BATCH_SPEC,
  MESH_AXES,
  check_batch_size,
  replicated_sharding,
)
from mtv_jax.utils import xla_flags

Image = UInt8[np.ndarray, "h w 3"]
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PreparedInput:
  """An expert's input for one record."""

  group: Hashable  # A group's records have equal shapes and share batches.
  arrays: Arrays  # For `run`, without a batch dimension.
  meta: Any = None  # For `finish`.


@runtime_checkable
class Expert(Protocol):
  """A model that labels images in batches.

  `prepare` and `finish` run on the host in several threads. `run` is called
  from one thread and returns before the devices are done, to overlap host and
  device work.
  """

  kind: str  # Kind of labels, one of `label_values.KINDS`.
  # Everything that determines the labels (JSON), for the manifest: model, hash
  # of the weights, sizes, thresholds.
  settings: Mapping[str, Any]
  rows: int  # Batch size of `run`, over all devices of this host.

  def prepare(self, image: Image, record: Record) -> PreparedInput:
    """Preprocesses a decoded image.

    Args:
      image: image of any size, with EXIF rotation applied.
      record: key, captions (possibly empty) and `meta`, its .json fields.

    Raises:
      BadRecord: the record cannot be labelled; it is counted by reason.
    """
    ...

  def run(self, arrays: Arrays) -> Mapping[str, jax.Array | np.ndarray]:
    """Starts the model on stacked arrays `[rows, ...]` of one group.

    Returns arrays `[rows, ...]`; experts that run on the host return NumPy.
    """
    ...

  def finish(self, outputs: Arrays, meta: Any) -> LabelOutcome:
    """Converts one record's row of `run`'s arrays to its label."""
    ...


def check_options(load: Callable[..., Expert]) -> Callable[..., Expert]:
  """Decorates `load_expert` to check options against its annotations."""
  name = load.__module__.removeprefix("mtv_jax.experts.")

  @functools.wraps(load, updated=())
  def checked_load(path: str | os.PathLike, **options: Any) -> Expert:
    return build(functools.partial(load, path), options, where=name)

  return checked_load


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
