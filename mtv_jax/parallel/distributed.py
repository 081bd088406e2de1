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

  Args:
    distributed: join; on a TPU pod, SLURM or Open MPI hosts find each other.
    coordinator: host:port of process 0, for elsewhere; implies `distributed`.
    processes: how many there are.
    process: which one this is, from 0.

  Raises:
    InputError: some of the last three are given and others not.
  """
  given = [coordinator, processes, process]
  if any(g is not None for g in given) and None in given:
    raise InputError(
      "--coordinator, --processes and --process go together: got "
      f"coordinator={given[0]}, processes={given[1]}, process={given[2]}."
    )
  if distributed or coordinator:
    jax.distributed.initialize(*given)
