"""Processor cores of this process."""

import os


def available_cores() -> int:
  """Cores that this process may use, which in a container are fewer."""
  if hasattr(os, "sched_getaffinity"):  # Linux
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
