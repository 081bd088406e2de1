"""Changes of evaluations since step 0, with paired intervals.

The runs of an arm are its seeds. Each evaluation after the start is compared
with the one at step 0 of the same run, on the same items.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from mtv_jax.evals.core import results
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.report.report import is_main
from mtv_jax.evals.report.tables import protocol_key
from mtv_jax.studies.contrasts import (
  Contrast,
  Metric,
  estimate_contrast,
)
from mtv_jax.studies.folders import RunFolder, list_evaluations
from mtv_jax.studies.results import (
  collect_measurements,
  describe_metrics,
  with_resamples,
)
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class Changes:
  """A metric of an arm after the start, minus the one before the first step."""

  arm: str
  metric: Metric
  start: float  # mean over seeds
  # Of the evaluations after the start that all seeds have, in order.
  by_step: dict[int, Contrast]

  @property
  def worst_step(self) -> int:
    """The step with the largest loss."""
    return min(self.by_step, key=lambda step: self.by_step[step].gain)

  @property
  def best_step(self) -> int:
    """The step with the largest gain."""
    return max(self.by_step, key=lambda step: self.by_step[step].gain)

  @property
  def num_below_start(self) -> int | None:
    """Number of evaluations that are worse than the start beyond the interval.

    Over items, and over seeds too where there are several, without a correction
    for the number of evaluations. None if an interval is not known.
    """
    if any(c.item_low is None for c in self.by_step.values()):
      return None
    if self.metric.lower:
      return sum(c.item_low > 0 for c in self.by_step.values())
    return sum(c.item_high < 0 for c in self.by_step.values())


def measure_changes(runs: Sequence[RunFolder]) -> list[Changes]:
  """Changes of the main metrics that the seeds of an arm have at step 0.

  Evaluations under another protocol than that of step 0 are left out, and those
  without a finite value in every seed.

  Args:
    runs: of one arm, with distinct seeds.

  Raises:
    InputError: a file of an evaluation can't be read.
  """
  files = {run.seed: list_evaluations(run.folder) for run in runs}
  first = next(iter(files.values()))
  measured = []
  for name, steps in first.items():
    by_step = {
      step: {seed: _read(files[seed][name][step], name) for seed in files}
      for step in steps
      if all(step in seed.get(name, {}) for seed in files.values())
    }
    if 0 not in by_step:
      continue
    start = next(iter(by_step[0].values()))
    key = protocol_key(start)
    same = {
      step: seeds
      for step, seeds in by_step.items()
      if all(protocol_key(result) == key for result in seeds.values())
    }
    for metric in describe_metrics(name, start):
      short = metric.name.removeprefix(f"{name}/")
      if is_main(name, short, [*start.metrics]):
        measured.append(_measure(runs[0].arm, metric, name, same))
  return [changes for changes in measured if changes is not None]


def _measure(
  arm: str,
  metric: Metric,
  name: str,
  by_step: Mapping[int, Mapping[int, Result]],
) -> Changes | None:
  """The changes of one metric, if any; results are by step and seed."""
  data = collect_measurements(
    {
      str(step): {seed: {name: result} for seed, result in seeds.items()}
      for step, seeds in by_step.items()
    }
  )
  complete = [
    step
    for step, seeds in by_step.items()
    if len(data.seeds(str(step), metric.name)) == len(seeds)
  ]
  if 0 not in complete or len(complete) < 2:
    return None
  values = [run[metric.name] for run in data.values["0"].values()]
  by_step = {
    step: estimate_contrast(data, metric, {str(step): 1.0, "0": -1.0})
    for step in complete
    if step > 0
  }
  return Changes(arm, metric, sum(values) / len(values), by_step)


def _read(path: pathlib.Path, name: str) -> Result:
  for outcome in results.read(path):
    if name in outcome.results:
      return with_resamples(outcome.results[name], path)
  raise InputError(f"{path} has no results of {name!r}.")
