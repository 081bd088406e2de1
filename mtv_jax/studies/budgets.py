"""Report of studies that differ in run length: metrics over training FLOPs."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from mtv_jax.report import charts, page
from mtv_jax.report.charts import Chart
from mtv_jax.report.contrasts import (
  MIN_SEEDS,
  ArmMeasurements,
  Metric,
)
from mtv_jax.report.run_folders import group_by_arm
from mtv_jax.report.tables import differences_table
from mtv_jax.studies import statistics
from mtv_jax.studies.expand import Study, StudyRun
from mtv_jax.studies.lengths import check_differ_in_length
from mtv_jax.studies.page import (
  ARMS_NOTE,
  FEW_SEEDS_NOTE,
  PROTOCOLS_NOTE,
  describe_protocols,
  values_table,
)
from mtv_jax.studies.statistics import StudyResults, summarise_arm
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.text import file_name

_NOTE = (
  "Differences at equal budgets, in the metric's unit, with 95 % intervals, "
  "not corrected for their number. Verdicts are on the page of each study: no "
  "family of tests spans the studies."
)
_FIELDS = ("values", "errors", "resamples", "protocols")
_MATCHED = {"images": "see equally many images", "flops": "have equal FLOPs"}


@dataclasses.dataclass(frozen=True)
class _ArmAtBudget:
  """The runs of an arm in one study."""

  arm: str
  budget: float  # See `Study.budget`.
  runs: Sequence[StudyRun]
  finished: int  # number of runs

  @property
  def name(self) -> str:
    """Name in tables."""
    return f"{self.arm}, {self.budget:g}"

  @property
  def tflop(self) -> float:
    """Training FLOPs of a run, divided by 1e12."""
    return self.runs[0].flops / 1e12


def write_budgets(
  folders: Sequence[str | os.PathLike], output: str | os.PathLike
) -> list[pathlib.Path]:
  """Writes the report of studies of one config; returns both pages.

  InputError if the studies differ in more than what `mtv-jax study --budget`
  scales, or lack finished runs or their FLOPs.
  """
  if not folders:
    raise InputError("no studies: name their folders.")
  studies = {}
  for folder in map(pathlib.Path, folders):
    results = statistics.read_study(folder)
    for other in studies.values():
      _check_comparable(other.study, results.study)
    if not results.runs or any(run.flops is None for run in results.study.runs):
      raise InputError(
        f"{folder} has no finished runs, or no FLOPs of its runs: repeat its"
        " `mtv-jax study` command first."
      )
    studies[results.study.budget] = results
  ordered = [studies[budget] for budget in sorted(studies)]
  blocks = _describe_budgets(ordered)
  return page.write_pages("Metrics over FLOPs", blocks, output)[:2]


def _check_comparable(first: Study, second: Study) -> None:
  """Raises InputError unless the studies differ in their budget alone."""
  for name in ("kind", "match", "baseline"):
    values = getattr(first, name), getattr(second, name)
    if values[0] != values[1]:
      raise InputError(
        f"the studies differ in {name} ({values[0]}, {values[1]}): only"
        " studies that differ in --budget have a common page."
      )
  if f"{first.budget:g}" == f"{second.budget:g}":
    raise InputError(
      f"two studies have the budget {first.budget:g}: leave one of them out."
    )
  arms = [group_by_arm(study.runs) for study in (first, second)]
  for arm in arms[0].keys() & arms[1].keys():
    settings = [runs[arm][0].settings for runs in arms]
    advice = "only studies that differ in --budget have a common page."
    check_differ_in_length(arm, settings, advice)


def _describe_budgets(
  studies: Sequence[StudyResults],
) -> Iterator[page.PageBlock]:
  arms, data, metrics = _join(studies)
  rows = [["arm, budget", "finished", "steps", "TFLOP of a run"]]
  for arm in arms:
    finished = f"{arm.finished} of {len(arm.runs)} seeds"
    rows.append([arm.name, finished, f"{arm.runs[0].steps:,}"])
    rows[-1].append(f"{arm.tflop:.3g}")
  yield page.Table(rows, numbers=1)
  first = studies[0].study
  matched = _MATCHED[first.match]
  yield page.Note(f"{first.config}; the runs of a budget {matched}.")
  yield page.Charts(draw_budgets(studies))
  protocols = dict.fromkeys(x for s in studies for x in describe_protocols(s))
  if protocols:
    yield page.Note(PROTOCOLS_NOTE)
    yield page.Bullets([*protocols])
  yield page.Heading("Arms")
  yield page.Table(values_table(data, metrics), numbers=1)
  has_few_seeds = any(arm.finished < MIN_SEEDS for arm in arms)
  yield page.Note(
    f"{FEW_SEEDS_NOTE} {ARMS_NOTE}" if has_few_seeds else ARMS_NOTE
  )
  baseline = first.baseline
  bases = {arm.budget: arm.name for arm in arms if arm.arm == baseline}
  pairs = [
    (arm.name, bases[arm.budget])
    for arm in arms
    if arm.arm != baseline and arm.budget in bases
  ]
  if pairs:
    yield page.Heading(f"Differences from {baseline}")
    compared = statistics.compare(data, metrics, pairs, tests={})
    yield page.Table(differences_table(compared))
    yield page.Note(_NOTE)


def _join(
  studies: Sequence[StudyResults],
) -> tuple[list[_ArmAtBudget], ArmMeasurements, list[Metric]]:
  """The arms with finished runs, their measurements, and main metrics."""
  arms, metrics = [], {}
  fields: dict[str, dict[str, Any]] = {name: {} for name in _FIELDS}
  for results in studies:
    metrics |= {metric.name: metric for metric in results.main}
    for arm, runs in group_by_arm(results.study.runs).items():
      finished = len(results.measurements.values[arm])
      if finished:
        arms.append(_ArmAtBudget(arm, results.study.budget, runs, finished))
        for name, values in fields.items():
          measured = getattr(results.measurements, name)
          values[arms[-1].name] = measured.get(arm, {})
  return arms, ArmMeasurements(**fields), [*metrics.values()]


def draw_budgets(studies: Sequence[StudyResults]) -> list[Chart]:
  """A chart per metric: means of the arms over the FLOPs of a run."""
  arms, data, metrics = _join(studies)
  drawn = []
  for metric in metrics:
    series = []
    for colour, (name, members) in enumerate(group_by_arm(arms).items()):
      rows = [
        (arm.tflop, summarise_arm(data, metric, arm.name)) for arm in members
      ]
      series.append(charts.mean_series(name, rows, colour))
    options = dict(x_label="TFLOP of a run", log_x=True)
    name = file_name("budgets", metric.name)
    drawn.append(charts.line_chart(metric.label, series, name=name, **options))
  return drawn
