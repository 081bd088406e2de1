"""Traces of a run's steps, for XProf and TensorBoard."""

import contextlib
import logging
import pathlib
from typing import Any

import jax

log = logging.getLogger(__name__)


class StepProfiler(contextlib.AbstractContextManager):
  """Traces the steps `first` to `last`, inclusive, to a folder.

  Every process writes its own trace. A run that resumes after `first` writes no
  trace.
  """

  def __init__(self, folder: pathlib.Path, steps: tuple[int, int] | None):
    self._folder = folder
    self._first, self._last = steps or (0, 0)
    self._is_tracing = False

  def start(self, step: int) -> None:
    """Starts the trace before its first step."""
    if step != self._first:
      return
    try:
      jax.profiler.start_trace(str(self._folder))
    except Exception as error:  # A full disk, or another profiler.
      log.warning("No profile of step %d: %s", step, error)
      return
    self._is_tracing = True

  def stop(self, step: int, values: Any) -> None:
    """Stops the trace after its last step, which computes `values`."""
    if not self._is_tracing or step < self._last:
      return
    jax.block_until_ready(values)
    self._finish()

  def _finish(self) -> None:
    self._is_tracing = False
    try:
      jax.profiler.stop_trace()
    except Exception as error:
      log.warning("No profile: %s", error)
    else:
      log.info("Wrote a profile to %s.", self._folder)

  def __exit__(self, *error: Any) -> None:
    if self._is_tracing:
      self._finish()
