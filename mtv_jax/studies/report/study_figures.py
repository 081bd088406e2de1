"""Tables and charts of a study: arms, differences, synergy, scaling."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.evals.report.report import Z_95, file_name, is_main
from mtv_jax.studies import contrasts, scaling_fits, statistics
from mtv_jax.studies.contrasts import Contrast, Measurements, Metric
from mtv_jax.studies.scaling_fits import Parameter, ScalingFit
from mtv_jax.studies.statistics import Comparison, Summary, Synergy
from mtv_jax.utils import charts
from mtv_jax.utils.charts import Chart, Row, Series
from mtv_jax.utils.html import Bold

_EMPTY = "–"


def select_main(metrics: Sequence[Metric]) -> list[Metric]:
  """The metrics that an evaluation report charts: one or two an evaluation."""
  groups = collections.defaultdict(list)
  for metric in metrics:
    evaluation, _, name = metric.name.partition("/")
    groups[evaluation].append((name, metric))
  return [
    metric
    for evaluation, members in groups.items()
    for name, metric in members
    if is_main(evaluation, name, [n for n, _ in members])
  ]


def compare_in_order(
  data: Measurements, metrics: Sequence[Metric]
) -> list[Comparison]:
  """Compares each arm with the one before it, corrected as one family."""
  arms = list(data.values)
  rows = []
  for metric in metrics:
    for before, arm in zip(arms, arms[1:], strict=False):
      contrast = contrasts.estimate_contrast(
        data, metric, {arm: 1.0, before: -1.0}
      )
      names = dict(metric=metric.name, arm=arm, baseline=before)
      rows.append(Comparison(**vars(contrast), **names))
  return statistics.correct_contrasts(rows)


def values_table(
  data: Measurements, metrics: Sequence[Metric]
) -> list[list[str]]:
  """Means with intervals, and chance: a header, then a row for each metric."""
  rows = [["metric", *data.values, "chance"]]
  for metric in metrics:
    summaries = [statistics.summarise_arm(data, metric, a) for a in data.values]
    chance = (
      "" if metric.chance is None else format_value(metric.chance, metric)
    )
    rows.append([label(metric), *(_mean(s, metric) for s in summaries), chance])
  return rows


def label(metric: Metric) -> str:
  """A metric's name with its unit and direction."""
  unit = f" ({metric.unit})" if metric.unit else ""
  return f"{metric.name}{unit}{' ↓' if metric.lower else ''}"


def unit_scale(metric: Metric) -> float:
  """The factor from a metric to the unit that it is shown in."""
  return 100.0 if metric.unit == "%" else 1.0


def format_value(value: float, metric: Metric, *, signed: bool = False) -> str:
  """A value in its unit, without it."""
  digits = 1 if metric.unit == "%" else 3
  text = f"{unit_scale(metric) * value:{'+' if signed else ''}.{digits}f}"
  return text.replace("-", "\u2212")


def _interval(summary: Summary) -> tuple[float, float] | None:
  """Over seeds if there are several, else over items."""
  if summary.mean is None:
    return None
  if summary.low is not None:
    return summary.low, summary.high
  if summary.item_error is None:
    return None
  half = Z_95 * summary.item_error
  return summary.mean - half, summary.mean + half


def _mean(summary: Summary, metric: Metric) -> str:
  if summary.mean is None:
    return _EMPTY
  text = format_value(summary.mean, metric)
  if interval := _interval(summary):
    text += f" [{', '.join(format_value(v, metric) for v in interval)}]"
  return text


def draw_arms(
  data: Measurements,
  metrics: Sequence[Metric],
  comparisons: Sequence[Comparison],
) -> list[Chart]:
  """A chart for each metric: arms with intervals, seeds and chance."""
  verdicts = {(c.metric, c.arm): c for c in comparisons}
  drawn = []
  for metric in metrics:
    factor, rows = unit_scale(metric), []
    for colour, arm in enumerate(data.values):
      summary = statistics.summarise_arm(data, metric, arm)
      low, high = _interval(summary) or (None, None)
      runs = data.values[arm]
      seeds = [runs[s][metric.name] for s in data.seeds(arm, metric.name)]
      compared = verdicts.get((metric.name, arm))
      note = f"{compared.verdict} than {compared.baseline}" if compared else ""
      if compared and compared.verdict not in ("better", "worse"):
        note = f"{compared.verdict} from {compared.baseline}"
      rows.append(
        Row(
          arm,
          *(v if v is None else factor * v for v in (summary.mean, low, high)),
          points=[factor * v for v in seeds] if len(seeds) > 1 else (),
          chance=None if metric.chance is None else factor * metric.chance,
          colour=colour,
          note=note,
        )
      )
    drawn.append(
      charts.interval_plot(
        metric.name.replace("/", " "),
        rows,
        name=file_name("arms", metric.name),
        unit=metric.unit,
        lower=metric.lower,
      )
    )
  return drawn


def differences_table(
  comparisons: Sequence[Comparison], metrics: Sequence[Metric]
) -> list[list[str]]:
  """Differences with intervals and verdicts: a header, a row per metric."""
  arms = dict.fromkeys(c.arm for c in comparisons)
  cells = {(c.metric, c.arm): c for c in comparisons}
  before = {c.arm: c.baseline for c in comparisons}
  several = len({*before.values()}) > 1
  rows = [["metric"]]
  rows[0] += [f"{a} − {before[a]}" if several else a for a in arms]
  for metric in metrics:
    rows.append([label(metric)])
    for arm in arms:
      rows[-1].append(_difference(cells[metric.name, arm], metric))
  return rows


def _difference(contrast: Contrast, metric: Metric) -> str:
  """The difference, its interval (over seeds, else over items), the verdict."""
  if contrast.difference is None:
    return contrast.verdict
  text = format_value(contrast.difference, metric, signed=True)
  ends = [contrast.low, contrast.high]
  if ends[0] is None:
    ends = [contrast.item_low, contrast.item_high]
  if ends[0] is not None:
    ends = [format_value(v, metric, signed=True) for v in ends]
    text += f" [{', '.join(ends)}]"
  text += f"\n{contrast.verdict}"
  is_distinct = contrast.verdict in (contrasts.BETTER, contrasts.WORSE)
  return Bold(text) if is_distinct else text


def contrast_table(
  rows: Sequence[tuple[str, Metric, Contrast]],
) -> list[list[str]]:
  """Everything about contrasts: a header, then a row for each (name, ...)."""
  head = ["comparison", "metric", "difference", "seeds 95 %", "items 95 %"]
  table = [[*head, "p", "p Holm", "n", "test", "verdict", "note"]]
  for name, metric, c in rows:

    def ends(low: float | None, high: float | None, metric=metric) -> str:
      if low is None or high is None:
        return _EMPTY
      return ", ".join(
        format_value(v, metric, signed=True) for v in (low, high)
      )

    difference = _EMPTY
    if c.difference is not None:
      difference = format_value(c.difference, metric, signed=True)
    table.append(
      [
        name,
        label(metric),
        difference,
        ends(c.low, c.high),
        ends(c.item_low, c.item_high),
        *(_EMPTY if p is None else f"{p:.2g}" for p in (c.p, c.p_holm)),
        str(c.n),
        c.test or _EMPTY,
        c.verdict,
        c.note,
      ]
    )
  return table


def draw_synergies(
  synergies: Sequence[Synergy], metrics: Sequence[Metric]
) -> list[Chart]:
  """A matrix for each metric.

  Right of the diagonal the gain of a pair over the better of the two, left of
  it that over the sum of both gains; gains are positive. Bold: distinguishable.
  """
  drawn = []
  for metric in metrics:
    rows = [s for s in synergies if s.metric == metric.name]
    names = list(dict.fromkeys(n for s in rows for n in (s.first, s.second)))
    values = [[None] * len(names) for _ in names]
    marks = [[False] * len(names) for _ in names]
    for s in rows:
      i, k = sorted((names.index(s.first), names.index(s.second)))
      for contrast, (a, b) in (
        (s.over_better, (i, k)),
        (s.over_additive, (k, i)),
      ):
        if contrast is not None and contrast.gain is not None:
          values[a][b] = unit_scale(metric) * contrast.gain
          marks[a][b] = contrast.verdict in (contrasts.BETTER, contrasts.WORSE)
    if any(v is not None for row in values for v in row):
      drawn.append(
        charts.heat_map(
          label(metric).removesuffix(" ↓"),
          values,
          rows=names,
          columns=names,
          name=file_name("synergy", metric.name),
          marks=marks,
        )
      )
  return drawn


def synergy_rows(
  synergies: Sequence[Synergy], metrics: Sequence[Metric]
) -> list[tuple[str, Metric, Contrast]]:
  """Rows of `contrast_table`."""
  by_name = {metric.name: metric for metric in metrics}
  rows = []
  for s in synergies:
    metric = by_name[s.metric]
    rows.append((f"{s.arm} − {s.better}", metric, s.over_better))
    if s.over_additive is not None:
      rows.append((f"{s.arm} − sum of both", metric, s.over_additive))
  return rows


def fit_metrics(
  data: Measurements,
  metrics: Sequence[Metric],
  sizes: Mapping[str, Mapping[str, Any]],
) -> dict[str, ScalingFit]:
  """A scaling law of each metric that is an error or a fraction.

  Args:
    data: of all arms; each run is a point.
    metrics: those to fit.
    sizes: `images` and `parameters` of each arm; a variable that does not vary
      is left out.
  """
  fits = {}
  for metric in metrics:
    points = [
      (sizes[arm], data.values[arm][seed][metric.name])
      for arm in data.values
      for seed in data.seeds(arm, metric.name)
    ]
    if not points or not (metric.lower or metric.unit == "%"):
      continue
    names = [
      name
      for name in ("images", "parameters")
      if len({size.get(name) for size, _ in points}) > 1
    ]
    x = {name: [float(size[name]) for size, _ in points] for name in names}
    y = [value for _, value in points]
    if names and (metric.lower or max(y) < 1) and min(y) > 0:
      fits[metric.name] = scaling_fits.fit_scaling(metric, x, y)
  return fits


def draw_scaling(
  data: Measurements,
  metrics: Sequence[Metric],
  sizes: Mapping[str, Mapping[str, Any]],
  fits: Mapping[str, ScalingFit],
  x_label: str = "distinct images",
) -> list[Chart]:
  """A chart for each metric over the images, with a curve for each model.

  `sizes` has `model`, `images` and `parameters` of each arm.
  """
  models = collections.defaultdict(list)
  for arm in data.values:
    models[sizes[arm]["model"]].append(arm)
  drawn = []
  for metric in metrics:
    factor, lines = unit_scale(metric), []
    for colour, (model, arms) in enumerate(models.items()):
      points, intervals = [], []
      for arm in sorted(arms, key=lambda a: sizes[a]["images"]):
        summary = statistics.summarise_arm(data, metric, arm)
        if summary.mean is None:
          continue
        x = sizes[arm]["images"]
        points.append((x, factor * summary.mean))
        if ends := _interval(summary):
          intervals.append((x, *(factor * v for v in ends)))
      if not points:
        continue
      lines.append(Series(model, points, colour, intervals, "dots"))
      fit = fits.get(metric.name)
      if fit is not None and fit.is_identifiable and len(points) > 1:
        x = np.geomspace(points[0][0], points[-1][0], 40)
        size = np.full(40, float(sizes[arms[0]].get("parameters", 1)))
        known = {"images": x, "parameters": size}
        y = factor * fit.predict({name: known[name] for name in fit.centres})
        curve = [*zip(x.tolist(), y.tolist(), strict=True)]
        lines.append(Series(f"fit, {model}", curve, colour, style="dashed"))
    if lines:
      drawn.append(
        charts.line_chart(
          label(metric),
          lines,
          name=file_name("scaling", metric.name),
          x_label=x_label,
          log_x=True,
          chance=None if metric.chance is None else factor * metric.chance,
        )
      )
  return drawn


def fits_table(fits: Mapping[str, ScalingFit]) -> list[list[str]]:
  """Parameters of fits with intervals: a header, then a row for each metric."""
  names = list(
    dict.fromkeys(n for fit in fits.values() for n in fit.parameters)
  )
  rows = [["metric", *names, "R²", "points"]]
  for metric, fit in fits.items():
    cells = [fit.parameters.get(name) for name in names]
    r2 = _EMPTY if fit.r2 is None else f"{fit.r2:.3f}"
    texts = [_EMPTY if p is None else _format_parameter(p) for p in cells]
    rows.append([metric, *texts, r2, str(fit.points)])
  return rows


def _format_parameter(parameter: Parameter) -> str:
  value, *ends = (
    "0" if abs(v) < 1e-4 else f"{v:.3g}"
    for v in (parameter.value, parameter.low, parameter.high)
  )
  return f"{value}\n[{', '.join(ends)}]"


def describe_laws(fits: Mapping[str, ScalingFit]) -> list[str]:
  """The form of the fits, a line for each one that differs."""
  lines = {}
  for metric, fit in fits.items():
    e = "1 − metric" if fit.is_complement else "metric"
    centres = ", ".join(f"{k}₀ = {v:,.0f}" for k, v in fit.centres.items())
    note = f"; {fit.note}" if fit.note else ""
    line = f"{fit.formula}; e = {e}; {centres}{note}"
    lines.setdefault(line, []).append(metric)
  return [f"{', '.join(names)}: {line}" for line, names in lines.items()]
