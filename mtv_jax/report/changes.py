"""Changes of evaluations since step 0, on equal items, by arm."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from mtv_jax.evals.core.base import Result
from mtv_jax.report import charts
from mtv_jax.report.charts import Chart, Series
from mtv_jax.report.contrasts import (
  Contrast,
  Metric,
  collect_measurements,
  estimate_contrast,
  list_metrics,
  protocol_key,
)
from mtv_jax.report.page import Charts, Details, Heading, Note, PageBlock, Table
from mtv_jax.report.run_folders import (
  RunRecord,
  group_by_arm,
  list_evaluations,
  read_outcomes,
)
from mtv_jax.report.tables import (
  EMPTY,
  contrast_table,
  format_difference,
  format_metric_value,
  select_main,
)
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.text import file_name

_NOTE = (
  "Main metrics that were evaluated before the first step, on the same items. "
  "Intervals are 95 % over the items, for these runs: another seed may change "
  "differently. The last column counts evaluations whose whole interval is "
  "worse than the start, uncorrected for the number of evaluations."
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
    """The step with the lowest gain."""
    return min(self.by_step, key=lambda step: self.by_step[step].gain)

  @property
  def best_step(self) -> int:
    """The step with the highest gain."""
    return max(self.by_step, key=lambda step: self.by_step[step].gain)

  @property
  def num_below_start(self) -> int | None:
    """Evaluations whose whole interval is worse; None if unknown."""
    if any(c.low is None for c in self.by_step.values()):
      return None
    if self.metric.lower:
      return sum(c.low > 0 for c in self.by_step.values())
    return sum(c.high < 0 for c in self.by_step.values())


def describe_changes(runs: Sequence[RunRecord]) -> Iterator[PageBlock]:
  """Changes of evaluations since step 0; empty without such evaluations."""
  arms = group_by_arm(runs)
  changes = [c for arm in arms.values() for c in measure_changes(arm)]
  if not changes:
    return
  names = [*dict.fromkeys(c.metric.name for c in changes)]
  changes.sort(key=lambda change: names.index(change.metric.name))
  yield Heading("Changes since the start")
  yield Table(_changes_table(changes), numbers=2)
  yield Note(_NOTE)
  colours = {arm: i for i, arm in enumerate(arms)}
  by_metric = [[c for c in changes if c.metric.name == name] for name in names]
  yield Charts([_draw_metric(group, colours) for group in by_metric])
  rows = [
    (f"{change.arm}, step {step:,}", contrast)
    for change in changes
    for step, contrast in change.by_step.items()
  ]
  table = Table(contrast_table(rows, ("p Holm", "verdict")), numbers=2)
  yield Details("Every evaluation", [table])


def measure_changes(runs: Sequence[RunRecord]) -> list[Changes]:
  """Changes of main metrics that all of an arm's seeds evaluated at step 0.

  Skips steps with a different protocol or without a finite value of a seed.
  """
  files = {run.seed: list_evaluations(run.folder) for run in runs}
  changes = []
  for name, steps in next(iter(files.values())).items():
    by_step = {
      step: {seed: _read(files[seed][name][step], name) for seed in files}
      for step in steps
      if all(step in seed.get(name, {}) for seed in files.values())
    }
    if 0 not in by_step:
      continue
    start = next(iter(by_step[0].values()))
    data = collect_measurements(
      {
        str(step): {seed: {name: result} for seed, result in seeds.items()}
        for step, seeds in by_step.items()
        if {*map(protocol_key, seeds.values())} == {protocol_key(start)}
      },
      fixed=True,
    )
    for metric in select_main(list_metrics([(name, start)])):
      complete_steps = [
        step
        for step in data.values
        if len(data.seeds(step, metric.name)) == len(files)
      ]
      if complete_steps[:1] == ["0"] and len(complete_steps) > 1:
        values = data.read("values", metric, "0", [*files])
        contrasts = {
          int(step): estimate_contrast(data, metric, {step: 1.0, "0": -1.0})
          for step in complete_steps[1:]
        }
        mean = sum(values) / len(values)
        changes.append(Changes(runs[0].arm, metric, mean, contrasts))
  return changes


def _read(path: pathlib.Path, name: str) -> Result:
  for outcome in read_outcomes(path):
    if name in outcome.results:
      return outcome.results[name]
  raise InputError(f"{path} lacks results of {name!r}.")


def _draw_metric(changes: Sequence[Changes], colours: dict[str, int]) -> Chart:
  """The change of a metric over steps, with 95 % intervals."""
  metric = changes[0].metric
  last_step = max(max(c.by_step) for c in changes)
  curves = [Series("start", [(0, 0.0), (last_step, 0.0)], style="dashed")]
  for change in changes:
    points, area = [(0, 0.0)], [(0, 0.0, 0.0)]
    for step, c in change.by_step.items():
      points.append((step, metric.scale * c.difference))
      if c.low is not None:
        ends = metric.scale * c.low, metric.scale * c.high
        area.append((step, *ends))
    area = area if len(area) > 1 else []
    curves.append(Series(change.arm, points, colours[change.arm], area))
  name = file_name("change", metric.name)
  title = f"Change of {metric.label}"
  return charts.line_chart(title, curves, name=name, x_label="step")


def _changes_table(changes: Sequence[Changes]) -> list[list[str]]:
  """Start, and worst, best and last change: a header, then rows."""
  header = ["metric", "run", "start", "worst", "best", "last"]
  rows = [[*header, "below the start"]]
  for change in changes:
    start = format_metric_value(change.start, change.metric)
    rows.append([change.metric.label, change.arm, start])
    for step in (change.worst_step, change.best_step, max(change.by_step)):
      text = format_difference(change.by_step[step])
      rows[-1].append(f"{text}\nat step {step:,}")
    num_below, count = change.num_below_start, len(change.by_step)
    rows[-1].append(EMPTY if num_below is None else f"{num_below} of {count}")
  return rows
