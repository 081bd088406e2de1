"""JAX's distributed runtime: initialisation, and what processes agree on."""

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
  """`jax.distributed.initialize`, before anything else touches a device.

  On TPU pods, SLURM and Open MPI the hosts find each other; elsewhere give the
  coordinator (host:port of process 0), the number of processes and this one's.
  JAX aborts a process whose others have not connected after some seconds.

  Raises:
    InputError: only some of the last three are given.
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
  """Whether a flag is set in any process; waits for all, unless there is one.

  Every process calls it at the same point of the program.
  """
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def gather_json(value: Any) -> list[Any]:
  """A JSON value of each process, process 0's first; waits for all.

  Every process calls it at the same point of the program.
  """
  if jax.process_count() == 1:
    return [value]
  return [json.loads(row) for row in gather_bytes(json.dumps(value).encode())]


def gather_bytes(data: bytes) -> list[bytes]:
  """Bytes of each process, process 0's first; waits for all.

  Every process calls it at the same point of the program. Padded to a power of
  two, so that few shapes are compiled.
  """
  sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
  padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  rows = multihost_utils.process_allgather(padded)  # [processes, bytes]
  return [
    np.asarray(row[:size]).tobytes()
    for row, size in zip(rows, sizes, strict=True)
  ]
