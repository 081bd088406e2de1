"""Changes of evaluations since step 0, with paired intervals.

The runs of an arm are its seeds. Each later evaluation is compared with the
run's evaluation at step 0, on equal items.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from mtv_jax.evals.core.base import Result
from mtv_jax.report import charts
from mtv_jax.report.charts import Chart, Series
from mtv_jax.report.contrasts import (
  Contrast,
  Metric,
  collect_measurements,
  describe_metrics,
  estimate_contrast,
)
from mtv_jax.report.differences import (
  contrast_table,
  format_difference,
  format_value,
)
from mtv_jax.report.page import Charts, Details, Heading, Note, PageBlock, Table
from mtv_jax.report.run_folders import (
  RunRecord,
  group_by_arm,
  list_evaluations,
  read_outcomes,
)
from mtv_jax.report.tables import is_main, protocol_key
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.text import file_name

_NOTE = (
  "Main metrics that were evaluated before the first step, on the same items. "
  "Intervals are 95 % over items, and over seeds too if there are several; the "
  "last column counts evaluations that are worse than the start beyond their "
  "interval. They are not corrected for the number of evaluations."
)


@dataclasses.dataclass(frozen=True)
class Changes:
  """An arm's metric at later steps, minus its value at step 0."""

  arm: str
  metric: Metric
  start: float  # mean over seeds
  # In step order; only steps after 0 that all seeds have evaluated.
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
    """Number of evaluations whose whole interval is worse than the start.

    None if an interval is unknown.
    """
    if any(c.item_low is None for c in self.by_step.values()):
      return None
    if self.metric.lower:
      return sum(c.item_low > 0 for c in self.by_step.values())
    return sum(c.item_high < 0 for c in self.by_step.values())


def describe_changes(runs: Sequence[RunRecord]) -> Iterator[PageBlock]:
  """Changes of evaluations since step 0; empty without such evaluations."""
  arms = group_by_arm(runs)
  found = [c for arm in arms.values() for c in measure_changes(arm)]
  if not found:
    return
  names = [*dict.fromkeys(c.metric.name for c in found)]
  found.sort(key=lambda change: names.index(change.metric.name))
  yield Heading("Changes since the start")
  yield Table(_changes_table(found), numbers=2)
  yield Note(_NOTE)
  colours = {arm: i for i, arm in enumerate(arms)}
  members = [[c for c in found if c.metric.name == name] for name in names]
  yield Charts([_draw_metric(changes, colours) for changes in members])
  rows = [
    (f"{change.arm}, step {step:,}", contrast)
    for change in found
    for step, contrast in change.by_step.items()
  ]
  # Drop the corrected p value and the verdict based on it.
  table = [row[:6] + row[7:9] + row[10:] for row in contrast_table(rows)]
  yield Details("Every evaluation", [Table(table, numbers=2)])


def measure_changes(runs: Sequence[RunRecord]) -> list[Changes]:
  """Changes of an arm's main metrics that all seeds evaluated at step 0.

  Skips evaluations whose protocol differs from step 0, or that lack a finite
  value for a seed. `runs` are one arm's, with distinct seeds.
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
  """Changes of one metric; None without finite values at step 0 and later."""
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
  for outcome in read_outcomes(path):
    if name in outcome.results:
      return outcome.results[name]
  raise InputError(f"{path} lacks results of {name!r}.")


def _draw_metric(changes: Sequence[Changes], colours: dict[str, int]) -> Chart:
  """The change of a metric over steps, with 95 % intervals."""
  metric = changes[0].metric
  last = max(max(c.by_step) for c in changes)
  curves = [Series("start", [(0, 0.0), (last, 0.0)], style="dashed")]
  for change in changes:
    points, area = [(0, 0.0)], [(0, 0.0, 0.0)]
    for step, c in change.by_step.items():
      points.append((step, metric.scale * c.difference))
      if c.item_low is not None:
        ends = metric.scale * c.item_low, metric.scale * c.item_high
        area.append((step, *ends))
    area = area if len(area) > 1 else []
    curves.append(Series(change.arm, points, colours[change.arm], area))
  name = file_name("change", metric.name)
  title = f"Change of {metric.label}"
  return charts.line_chart(title, curves, name=name, x_label="step")


def _changes_table(changes: Sequence[Changes]) -> list[list[str]]:
  """Start, and worst, best and last change: a header, then rows."""
  rows = [
    ["metric", "run", "start", "worst", "best", "last", "below the start"]
  ]
  for change in changes:
    below = change.num_below_start
    steps = change.worst_step, change.best_step, max(change.by_step)
    rows.append(
      [
        change.metric.label,
        change.arm,
        format_value(change.start, change.metric),
        *(
          format_difference(change.by_step[step], seeds=False)
          + f"\nat step {step:,}"
          for step in steps
        ),
        "–" if below is None else f"{below} of {len(change.by_step)}",
      ]
    )
  return rows
