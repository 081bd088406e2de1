"""Initialisation of JAX's distributed runtime."""

import jax

from mtv_jax.utils.errors import InputError


def initialize(
  *,
  distributed: bool = False,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> None:
  """`jax.distributed.initialize`, before anything else touches a device.

  On TPU pods, SLURM and Open MPI the hosts find each other; elsewhere give the
  coordinator (host:port of process 0), the number of processes and this one's.

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
    jax.distributed.initialize(*given)
