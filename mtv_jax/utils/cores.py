"""CPU cores of this process."""

import os


def available_cores() -> int:
  """Number of cores that this process may use; containers limit it."""
  if hasattr(os, "sched_getaffinity"):  # Linux
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
