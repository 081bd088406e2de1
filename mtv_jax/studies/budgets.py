"""Report of studies that differ in run length: metrics over training FLOPs."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from mtv_jax.config.overrides import list_differences
from mtv_jax.evals.core.base import Result
from mtv_jax.report import charts, page
from mtv_jax.report.charts import Chart
from mtv_jax.report.contrasts import (
  ArmMeasurements,
  Metric,
  collect_measurements,
  list_metrics,
)
from mtv_jax.report.run_folders import group_by_arm
from mtv_jax.report.tables import differences_table, select_main
from mtv_jax.studies import statistics
from mtv_jax.studies.expand import StudyRun
from mtv_jax.studies.page import values_table
from mtv_jax.studies.statistics import StudyResults, summarise_arm
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.text import file_name

# Settings that `mtv-jax study --budget` scales.
_LENGTH = re.compile(
  r"(total_|schedule\.|objectives\.\w+\.weight\.|teachers\.\w+\.update_every_"
  r"|optim\.rules$)"
)
_NOTE = (
  "Differences at equal budgets, in the metric's unit, with 95 % intervals, "
  "not corrected for their number. Verdicts are on the page of each study: no "
  "family of tests spans the studies."
)


@dataclasses.dataclass(frozen=True)
class ArmAtBudget:
  """The finished runs of an arm in one study."""

  arm: str
  budget: float  # See `Study.budget`.
  run: StudyRun  # the arm's first run
  results: Mapping[int, Mapping[str, Result]]  # by seed and evaluation

  @property
  def name(self) -> str:
    """Name in tables."""
    return f"{self.arm}, {self.budget:g}"


def write_budgets(
  folders: Sequence[str | os.PathLike], output: str | os.PathLike
) -> list[pathlib.Path]:
  """Writes the report of studies of one config; returns both pages.

  InputError if the runs of an arm are equally long in two studies, differ in
  more than what `mtv-jax study --budget` scales, or lack a count of FLOPs.
  """
  studies = [statistics.read_study(pathlib.Path(folder)) for folder in folders]
  arms = [arm for results in studies for arm in _read_arms(results)]
  for first, second in itertools.combinations(arms, 2):
    if first.arm == second.arm:
      _check_lengths(first.run, second.run)
  arms.sort(key=lambda arm: arm.budget)
  baselines = {results.study.baseline for results in studies}
  blocks = _describe_budgets(arms, baselines)
  return page.write_pages("Metrics over FLOPs", blocks, output)[:2]


def _read_arms(results: StudyResults) -> Iterator[ArmAtBudget]:
  by_name = {run.name: run.outcome.results for run in results.runs}
  for arm, planned in group_by_arm(results.study.runs).items():
    finished = {r.seed: by_name[r.name] for r in planned if r.name in by_name}
    if finished:
      if planned[0].flops is None:
        raise InputError(f"the study lacks the FLOPs of {arm!r}.")
      yield ArmAtBudget(arm, results.study.budget, planned[0], finished)


def _check_lengths(first: StudyRun, second: StudyRun) -> None:
  if first.steps == second.steps:
    raise InputError(
      f"two studies train {first.arm!r} for {first.steps:,} steps: leave one"
      " of them out."
    )
  differences = list_differences([first.settings, second.settings])
  keys = [key for key, _ in differences if not _LENGTH.match(key)]
  if keys:
    raise InputError(
      f"the runs of {first.arm!r} differ in {', '.join(keys)}: only studies"
      " that differ in --budget have a common page."
    )


def _describe_budgets(
  arms: Sequence[ArmAtBudget], baselines: Collection[str]
) -> Iterator[page.PageBlock]:
  data = collect_measurements({arm.name: arm.results for arm in arms})
  metrics = list_metrics(
    item for a in arms for r in a.results.values() for item in r.items()
  )
  metrics = select_main(metrics)
  rows = [["arm, budget", "seeds", "steps", "TFLOP of a run"]]
  for arm in arms:
    counts = f"{len(arm.results)}", f"{arm.run.steps:,}"
    rows.append([arm.name, *counts, f"{arm.run.flops / 1e12:.3g}"])
  yield page.Table(rows, numbers=1)
  yield page.Charts(draw_budgets(data, metrics, arms))
  yield page.Heading("Arms")
  yield page.Table(values_table(data, metrics), numbers=1)
  pairs = [
    (arm.name, base.name)
    for base, arm in itertools.permutations(arms, 2)
    if base.arm in baselines and base.budget == arm.budget
  ]
  if pairs:
    yield page.Heading("Differences")
    compared = statistics.compare(data, metrics, pairs, tests={})
    yield page.Table(differences_table(compared))
    yield page.Note(_NOTE)


def draw_budgets(
  data: ArmMeasurements,
  metrics: Sequence[Metric],
  arms: Sequence[ArmAtBudget],
) -> list[Chart]:
  """A chart per metric: means of the arms over the FLOPs of a run."""
  drawn = []
  for metric in metrics:
    series = []
    for colour, (name, members) in enumerate(group_by_arm(arms).items()):
      rows = [
        (arm.run.flops / 1e12, summarise_arm(data, metric, arm.name))
        for arm in members
      ]
      series.append(charts.mean_series(name, rows, colour))
    options = dict(x_label="TFLOP of a run", log_x=True)
    name = file_name("budgets", metric.name)
    drawn.append(charts.line_chart(metric.label, series, name=name, **options))
  return drawn
