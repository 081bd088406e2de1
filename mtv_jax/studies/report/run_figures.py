"""Charts and tables of runs: training curves, metrics, gradients, configs."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.config.overrides import ABSENT, list_differences
from mtv_jax.evals.report import tables
from mtv_jax.evals.report.report import (
  draw_metric,
  file_name,
  interval_row,
  is_main,
)
from mtv_jax.studies.folders import RunFolder
from mtv_jax.utils import charts
from mtv_jax.utils.charts import Chart, Series
from mtv_jax.utils.html import Swatch

# Metrics that are drawn below those of the evaluations.
_FURTHER = r"grad_norm$|/weight$|^interference/"
_TIMES = ("speed/images_per_second", "speed/wait")
_DASH = "–"
_MAX_VALUE = 160  # Characters of a config's value.


def group_by_arm(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
  """Runs by arm, in order."""
  arms = collections.defaultdict(list)
  for run in runs:
    arms[run.arm].append(run)
  return dict(arms)


def draw_training_curves(
  runs: Sequence[RunFolder], *, timed: bool = True
) -> tuple[list[Chart], list[Chart]]:
  """Metrics over steps, of each arm: losses and main metrics, then others.

  The curve of an arm of several seeds is their mean, within an area from the
  least to the largest. The total loss is not drawn where the arms' objectives
  differ, as it is then not one quantity.
  """
  names = dict.fromkeys(name for run in runs for name in run.series)
  objectives = {
    tuple(sorted(run.config.get("objectives") or ())) for run in runs
  }
  losses = [n for n in names if n.endswith("/loss")]
  if len(objectives) == 1 and len(losses) != 1:
    losses = [n for n in names if n == "loss"] + losses
  evaluated = {
    f"{evaluation}/{metric}": is_main(evaluation, metric, [*result.metrics])
    for run in runs
    for evaluation, result in run.outcome.results.items()
    for metric in result.metrics
  }
  main = [n for n in names if evaluated.get(n)]
  further = [n for n in names if evaluated.get(n) is False]
  further += [n for n in names if re.search(_FURTHER, n)]
  further += [n for n in names if timed and n in _TIMES]
  drawn = [_draw_curve(runs, name) for name in losses + main]
  rest = [_draw_curve(runs, name) for name in further]
  return [c for c in drawn if c], [c for c in rest if c]


def _draw_curve(runs: Sequence[RunFolder], name: str) -> Chart | None:
  """One metric over steps; None if no run has two values of it."""
  curves, values = [], []
  unit, chance = _find_unit(runs, name)
  factor = 100.0 if unit == "%" else 1.0
  for colour, (arm, members) in enumerate(group_by_arm(runs).items()):
    seeds = [dict(run.series.get(name, ())) for run in members]
    seeds = [seed for seed in seeds if seed]
    if not seeds:
      continue
    steps = sorted(set.intersection(*map(set, seeds)))
    table = np.array(
      [[factor * seed[s] for s in steps] for seed in seeds], float
    )
    thinned = [
      charts.thin_out([*zip(steps, line.tolist(), strict=True)])
      for line in (table.mean(0), table.min(0), table.max(0))
    ]
    mean, low, high = thinned
    area = []
    if len(seeds) > 1:
      area = [(x, a, b) for (x, a), (_, b) in zip(low, high, strict=True)]
    curves.append(Series(arm, mean, colour, area))
    values += [y for _, y in mean]
  if not any(len(curve.points) > 1 for curve in curves):
    return None
  positive = min(values) > 0
  return charts.line_chart(
    f"{name} ({unit})" if unit else name,
    curves,
    name=file_name("curve", name),
    x_label="step",
    log_y=positive and max(values) > 30 * min(values),
    chance=chance and factor * chance,
  )


def _find_unit(
  runs: Sequence[RunFolder], name: str
) -> tuple[str, float | None]:
  """Unit and chance of an evaluation's metric; "" and None for another one."""
  evaluation, _, metric = name.partition("/")
  for run in runs:
    result = run.outcome.results.get(evaluation)
    if result and metric in result.metrics:
      return result.units.get(metric, "%"), result.chance.get(metric)
  return "", None


def draw_run_metrics(run: RunFolder) -> list[Chart]:
  """Metrics of one run with chance: a chart for each evaluation and unit."""
  groups = collections.defaultdict(list)
  for row in tables.compare([run.outcome]):
    if row.evaluation in tables.DESCRIPTIVE or row.values[0] is None:
      continue
    groups[row.evaluation, row.unit].append(interval_row(row, 0, row.metric, 0))
  return [
    charts.interval_plot(
      evaluation, rows, name=file_name("metrics", evaluation, unit), unit=unit
    )
    for (evaluation, unit), rows in groups.items()
  ]


def draw_metrics(runs: Sequence[RunFolder]) -> tuple[list[Chart], list[Chart]]:
  """A chart for each metric with a row for each run: main ones, then others.

  Intervals are 1.96 standard errors over items to both sides.
  """
  main, further = [], []
  names: dict[str, list[str]] = collections.defaultdict(list)
  for row in tables.compare([run.outcome for run in runs]):
    if row.evaluation in tables.DESCRIPTIVE:
      continue
    names[row.evaluation].append(row.metric)
    if row.values.count(None) == len(runs):
      continue
    chart = draw_metric(row, [run.name for run in runs])
    chosen = is_main(row.evaluation, row.metric, names[row.evaluation])
    (main if chosen else further).append(chart)
  return main, further


def draw_interference(runs: Sequence[RunFolder]) -> list[Chart]:
  """Gradient conflicts of an arm's runs, means over measurements and seeds.

  Cosines of each pair of objectives by block, shares of conflicting pairs over
  steps, norms by block, and how far a step along one objective's gradient
  lowers the others' losses. Measurements with other objectives than the last
  one (some start later) are left out of the means.
  """
  rows = [row for run in runs for row in run.interference]
  if not rows or len(rows[-1]["objectives"]) < 2:
    return []
  objectives, blocks = rows[-1]["objectives"], rows[-1]["blocks"]
  keys = ("objectives", "blocks")
  rows = [r for r in rows if all(r[key] == rows[-1][key] for key in keys)]

  def mean(key: str) -> np.ndarray | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return np.array(values, float).mean(0) if values else None

  def draw(key: str, title: str, values, names, **options) -> Chart:
    name = file_name(key, runs[0].arm)
    options = {"columns": blocks, "x_label": "block", **options}
    return charts.heat_map(
      title, values.tolist(), rows=names, name=name, **options
    )

  drawn = []
  if (cosines := mean("cosines")) is not None:
    first, second = np.triu_indices(len(objectives), 1)
    pairs = [
      f"{objectives[i]}, {objectives[k]}"
      for i, k in zip(first, second, strict=True)
    ]
    title = "Cosine of two gradients"
    drawn.append(draw("cosines", title, cosines[first, second], pairs, limit=1))
  if (norms := mean("norms")) is not None:
    drawn.append(draw("norms", "Norm of the gradient", norms, objectives))
  if (transfer := mean("transfer")) is not None:
    options = dict(columns=objectives, x_label="loss")
    title = "Fall of losses (%) along a gradient"
    drawn.append(draw("transfer", title, 100 * transfer, objectives, **options))
  return drawn + _draw_conflicts(runs)


def _draw_conflicts(runs: Sequence[RunFolder]) -> list[Chart]:
  lines = [
    Series(
      f"seed {run.seed}" if len(runs) > 1 else run.name,
      [
        (row["step"], 100 * row["conflicts"])
        for row in run.interference
        if row.get("conflicts") is not None
      ],
      colour,
    )
    for colour, run in enumerate(runs)
  ]
  if not any(len(line.points) > 1 for line in lines):
    return []
  name = file_name("conflicts", runs[0].arm)
  title = "Negative cosines (% of pairs and blocks)"
  return [charts.line_chart(title, lines, name=name, x_label="step")]


def metrics_table(runs: Sequence[RunFolder]) -> list[list[str]]:
  """The last metrics with errors and chance: a header, then rows."""
  # Without links, as the report has no heading for each evaluation.
  rows = tables.metrics_table([run.outcome for run in runs])
  return [[str(evaluation), *rest] for evaluation, *rest in rows]


def runs_table(
  runs: Sequence[RunFolder], *, timed: bool = True
) -> list[list[str]]:
  """What the runs are: a header, then a row for each."""
  colours = {arm: i for i, arm in enumerate(group_by_arm(runs))}
  rows = [["run", "seed", "steps", "images"]]
  rows[0] += ["images/s", "core hours"] if timed else []
  for run in runs:
    batch, steps = run.config.get("batch_size", 0), run.step
    total = run.config.get("total_steps")
    progress = (
      f"{steps:,}" if total in (None, steps) else f"{steps:,}/{total:,}"
    )
    rows.append(
      [
        Swatch(run.name, colours[run.arm]),
        str(run.seed),
        progress,
        f"{steps * batch:,}",
      ]
    )
    if timed:
      rows[-1].append(_last(run, "speed/images_per_second", ".0f"))
      rows[-1].append(_last(run, "speed/core_hours", ".2f"))
  return rows


def _last(run: RunFolder, name: str, form: str) -> str:
  points = run.series.get(name)
  return format(points[-1][1], form) if points else _DASH


def config_table(runs: Sequence[RunFolder]) -> list[list[str]]:
  """Keys whose values differ: a header, then a row for each; seeds left out."""
  rows = [["key", *(run.name for run in runs)]]
  for key, values in list_differences([run.config for run in runs]):
    # A key that is None has no effect, as one that is absent.
    is_set = any(value not in (None, ABSENT) for value in values)
    if key != "seed" and is_set:
      rows.append([key, *(_format(value) for value in values)])
  return rows


def format_config(config: Mapping[str, Any]) -> str:
  """A config as JSON."""
  return json.dumps(config, indent=1, sort_keys=True)


def _format(value: Any) -> str:
  if value in (None, ABSENT):
    return _DASH
  text = value if isinstance(value, str) else json.dumps(value)
  return text[:_MAX_VALUE] + "…" * (len(text) > _MAX_VALUE)
