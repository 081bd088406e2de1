"""JAX's distributed runtime: initialisation, and gathers over processes."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtv_jax.utils.errors import InputError


def initialize(
  *,
  distributed: bool = False,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  seconds: int = 300,
) -> None:
  """Calls `jax.distributed.initialize`; must precede any use of a device.

  On TPU pods, SLURM and Open MPI JAX detects the cluster. Elsewhere pass the
  coordinator (host:port of process 0), the number of processes and this
  process's index. JAX aborts unless all processes connect within `seconds`.
  """
  given = [coordinator, processes, process]
  if any(g is not None for g in given) and None in given:
    raise InputError(
      "--coordinator, --processes and --process go together: got "
      f"coordinator={given[0]}, processes={given[1]}, process={given[2]}."
    )
  if distributed or coordinator:
    jax.distributed.initialize(*given, initialization_timeout=seconds)


def any_process(flag: bool) -> bool:
  """Whether any process sets the flag. Collective: all processes call it."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def gather_json(value: Any) -> list[Any]:
  """Gathers JSON values in process order. Collective: all processes call it."""
  if jax.process_count() == 1:
    return [value]
  return [json.loads(row) for row in gather_bytes(json.dumps(value).encode())]


def gather_bytes(data: bytes) -> list[bytes]:
  """Gathers bytes in process order. Collective: all processes call it.

  Pads to a power of two, to compile few shapes.
  """
  sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
  padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  rows = multihost_utils.process_allgather(padded)  # [processes, bytes]
  pairs = zip(rows, sizes, strict=True)
  return [np.asarray(row[:size]).tobytes() for row, size in pairs]
