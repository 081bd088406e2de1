"""Hooks: what a run does around its updates, such as evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from mtv_jax.data.pipeline import Batch
  from mtv_jax.train.run import Run
  from mtv_jax.train.train_loop import Trainer


class Hook:
  """Base class of hooks; each method does nothing by default.

  All processes call a method at the same point of the program.
  """

  def open(self, run: Run) -> None:
    """Checks the run and opens data, before anything is written."""

  def describe(self, run: Run) -> list[str]:
    """Lines of the run's description, after `open`."""
    return []

  def before_first_step(self, trainer: Trainer) -> None:
    """Called before a session's first update."""

  def on_batch(self, run: Run, batch: Batch) -> None:
    """Called with this process's rows of a batch, on the host."""

  def before_update(
    self, trainer: Trainer, step: int, batch: Any
  ) -> dict[str, Any]:
    """Called before the update of a step; returns metrics to log."""
    return {}

  def after_step(self, trainer: Trainer, step: int) -> None:
    """Called after an update; after the last one, once it is saved."""
