"""Tables of metrics and of differences, as text and as page tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mtv_jax.evals.core.base import evaluation_type
from mtv_jax.evals.core.results import Outcome, jsonable
from mtv_jax.report import contrasts
from mtv_jax.report.contrasts import (
  BETTER,
  COMPARED,
  MISSING,
  WORSE,
  ArmMeasurements,
  Comparison,
  Contrast,
  Metric,
  protocol_key,
)
from mtv_jax.report.page import Details, Note, Table
from mtv_jax.utils.text import align_columns, format_metric

EMPTY = "–"
_ABSENT = "(absent)"

BEST_NOTE = (
  "is better than every other value and than chance, for these encoders: p "
  "over the items, paired if both results have resamples, and corrected for "
  "the comparisons of the main or of the further metrics (Holm 1979), is "
  "below 0.05; marked only where all results have the same protocol, options "
  "and data"
)

_METRICS_NOTE = (
  "Chance is what random embeddings or guesses would give. A dash is a missing "
  "value, or one on other data than the first column's. ↓: lower is better. "
  "±: standard error over the items of the test set."
)


class MetricRow(NamedTuple):
  """One metric of one evaluation for several encoders."""

  evaluation: str
  metric: str
  unit: str  # "%" for fractions, else the metric's unit ("m", or "")
  lower: bool  # whether lower is better
  chance: float | None  # expected value of a random encoder
  values: tuple[float | None, ...]  # None if missing or on different data
  errors: tuple[float | None, ...]  # standard errors; None if unknown
  is_main: bool
  kind: str  # the type of the evaluation
  # Number of the protocol, from 1, if the evaluation has several; else 0.
  variant: int = 0
  best: int | None = None  # index of the best value, see `BEST_NOTE`
  # Differences from the baseline, if the baseline has a value.
  differences: tuple[Comparison, ...] = ()
  # Each value minus chance; None if either is unknown.
  over_chance: tuple[Contrast | None, ...] = ()

  @property
  def label(self) -> str:
    """Metric, protocol number and direction."""
    protocol = f" (protocol {self.variant})" if self.variant else ""
    return f"{self.metric}{protocol}{' ↓' if self.lower else ''}"


def select_main(metrics: Iterable[Metric]) -> list[Metric]:
  """The metrics that reports chart: one or two per evaluation."""
  first, main = {}, []
  for metric in metrics:
    evaluation = metric.name.partition("/")[0]
    is_first = first.setdefault(evaluation, metric) is metric
    if is_first if metric.is_main is None else metric.is_main:
      main.append(metric)
  return main


def compare(
  outcomes: Sequence[Outcome],
  *,
  split: bool = False,
  baseline: int | None = None,
  ranked: bool = True,
) -> list[MetricRow]:
  """Every metric of several encoders, in order.

  A row skips results on different data than the first result's. With `split`,
  data, protocols and options have separate rows. `baseline` is the index of an
  encoder. Unless `ranked`, no value is marked as the best.
  """
  rows, data, leading = [], [], []
  for name in evaluation_names(outcomes):
    results = [outcome.results.get(name) for outcome in outcomes]
    keys = [r and protocol_key(r, whole=split) for r in results]
    groups = list(dict.fromkeys(key for key in keys if key is not None))
    for number, group in enumerate(groups if split else groups[:1], 1):
      group_results = [
        r for r, k in zip(results, keys, strict=True) if k == group
      ]
      protocols = {protocol_key(result) for result in group_results}
      metrics = contrasts.list_metrics(
        (name, result) for result in group_results
      )
      measurements = contrasts.collect_measurements(
        {
          str(i): {0: {name: result}} if keys[i] == group else {}
          for i, result in enumerate(results)
        },
        fixed=True,
      )
      main = select_main(metrics)
      for metric in metrics:
        row = _make_row(metric, measurements, is_main=metric in main)
        variant = number if split and len(groups) > 1 else 0
        rows.append(row._replace(variant=variant))
        data.append((measurements, metric))
        # Without a main metric, no direction is better.
        is_comparable = ranked and len(protocols) == 1 and bool(main)
        leading.append(_find_leading(row) if is_comparable else None)
  names = {str(i): outcome.name for i, outcome in enumerate(outcomes)}
  return _add_verdicts(rows, data, leading, names, baseline)


def evaluation_names(outcomes: Sequence[Outcome]) -> list[str]:
  """Names of evaluations with results, in order of appearance."""
  return list(dict.fromkeys(name for o in outcomes for name in o.results))


def _make_row(
  metric: Metric, data: ArmMeasurements, *, is_main: bool
) -> MetricRow:
  """A row without verdicts, in the metric's displayed unit.

  A value is the mean over an arm's seeds; its error is known for one seed.
  """

  def scale(value: float | None) -> float | None:
    return metric.scale * value if contrasts.is_finite(value) else None

  values, errors = [], []
  for arm in data.values:
    seeds = data.seeds(arm, metric.name)
    by_seed = data.read("values", metric, arm, seeds)
    values.append(scale(sum(by_seed) / len(by_seed) if by_seed else None))
    by_seed = data.read("errors", metric, arm, seeds)
    errors.append(scale(by_seed[0] if len(by_seed) == 1 else None))
  evaluation, _, name = metric.name.partition("/")
  fields = metric.unit, metric.lower, scale(metric.chance)
  kind = evaluation_type(evaluation, metric.type)
  values, errors = tuple(values), tuple(errors)
  return MetricRow(evaluation, name, *fields, values, errors, is_main, kind)


def list_arm_rows(
  data: ArmMeasurements,
  metrics: Sequence[Metric],
  compared: Sequence[Comparison],
) -> list[MetricRow]:
  """Rows of main metrics with the means of arms over their seeds."""
  return [
    _make_row(metric, data, is_main=True)._replace(
      differences=tuple(c for c in compared if c.metric == metric)
    )
    for metric in metrics
  ]


def _find_leading(row: MetricRow) -> int | None:
  """Index of the best value; None if there are fewer than two values."""
  with_value = [i for i, value in enumerate(row.values) if value is not None]
  if len(with_value) < 2:
    return None
  return (min if row.lower else max)(with_value, key=lambda i: row.values[i])


def _add_verdicts(
  rows: Sequence[MetricRow],
  data: Sequence[tuple[ArmMeasurements, Metric]],
  leading: Sequence[int | None],
  names: Mapping[str, str],
  baseline: int | None,
) -> list[MetricRow]:
  """Adds the best value and the differences from the baseline to each row.

  Contrasts each value with chance, the leading value and the baseline's. Main
  and further metrics are one family each for Holm's correction, for chance and
  for the other contrasts. `names` are by arm of `data`.
  """
  # By (row, arm, reference) indices; the baseline is never an arm.
  corrected: dict[tuple[int, int, int], Comparison] = {}
  over_chance: dict[tuple[int, int], Contrast] = {}
  # Evaluations whose metrics have a better direction.
  evals_with_direction = {row.evaluation for row in rows if row.is_main}
  arms = [*names]
  for is_main in (True, False):
    family, chance_family = {}, {}
    for k, row in enumerate(rows):
      if row.is_main != is_main:
        continue
      for i, arm in enumerate(arms):
        chance_family[k, i] = contrast_chance(*data[k], arm)
      if row.evaluation not in evals_with_direction:
        continue
      for j in dict.fromkeys((baseline, leading[k])):
        if j is None or row.values[j] is None:
          continue
        for i in range(len(arms)):
          if i != j and (k, j, i) not in family:
            c = contrasts.compare_arms(*data[k], arms[i], arms[j])
            i_name, j_name = names[arms[i]], names[arms[j]]
            c = dataclasses.replace(c, arm=i_name, baseline=j_name)
            family[k, i, j] = c
    corrected |= contrasts.correct_by_key(family)
    over_chance |= contrasts.correct_by_key(chance_family)
  judged_rows = []
  for k, row in enumerate(rows):
    best = leading[k]
    by_pair = {p: c for p, c in corrected.items() if p[0] == k}
    vs_chance = tuple(over_chance.get((k, i)) for i in range(len(arms)))
    is_best = best is not None and all(
      c.verdict in (MISSING, WORSE if j == best else BETTER)
      for (_, i, j), c in by_pair.items()
      if best in (i, j)
    )
    if is_best and vs_chance[best] is not None:
      is_best = vs_chance[best].verdict == BETTER
    differences = tuple(c for (_, _, j), c in by_pair.items() if j == baseline)
    row = row._replace(
      best=best if is_best else None,
      differences=differences,
      over_chance=vs_chance,
    )
    judged_rows.append(row)
  return judged_rows


def contrast_chance(
  data: ArmMeasurements, metric: Metric, arm: str
) -> Contrast | None:
  """An arm minus chance, uncorrected; None if either is unknown."""
  if metric.chance is None or not data.seeds(arm, metric.name):
    return None
  return contrasts.estimate_contrast(data, metric, {arm: 1.0}, -metric.chance)


def format_value(
  value: float | None,
  unit: str,
  error: float | None = None,
  *,
  digits: int = 2,
) -> str:
  """Formats a value with its unit: `50.00 %`, `0.469 ± 0.012 m`."""
  text = format_metric(value, unit, error, digits=digits)
  return text if value is None or not unit else f"{text} {unit}"


def format_results(outcomes: Sequence[Outcome]) -> str:
  """Formats results for a terminal: metrics with chance, then protocols."""
  lines = [format_metrics(outcomes)]
  for outcome in outcomes:
    if outcome.protocol:
      lines.append(f"\n{outcome.name}:")
      lines += _list_entries(outcome.protocol)
  for name in evaluation_names(outcomes):
    protocol = compare_protocols(outcomes, name)
    lines += [f"\n{name}:", *_list_entries(protocol.common)]
    for key, values in protocol.differing.items():
      for encoder, value in zip(protocol.encoders, values, strict=True):
        lines.append(f"  {key} of {encoder}: {format_entry(value)}")
  return "\n".join(lines)


def _list_entries(protocol: Mapping[str, Any]) -> list[str]:
  return [f"  {key}: {format_entry(v)}" for key, v in protocol.items()]


def format_metrics(
  outcomes: Sequence[Outcome],
  *,
  split: bool = False,
  baseline: int | None = None,
) -> str:
  """A text table of metrics with standard errors; a star marks the best."""
  names = [outcome.name for outcome in outcomes]
  cells = [("evaluation", "metric", "unit", *names, "chance")]
  rows = compare(outcomes, split=split, baseline=baseline)
  for row in rows:
    unit = f"{row.unit} (lower)".strip() if row.lower else row.unit
    values = [
      format_metric(value, row.unit, error) + " *" * (i == row.best)
      for i, (value, error) in enumerate(
        zip(row.values, row.errors, strict=True)
      )
    ]
    chance = "" if row.chance is None else format_metric(row.chance, row.unit)
    metric = row.label.removesuffix(" ↓")
    cells.append((row.evaluation, metric, unit, *values, chance))
  lines = align_columns(cells, left=(0, 1, 2))
  lines.insert(1, "-" * max(map(len, lines)))
  if any(row.errors.count(None) < len(row.errors) for row in rows):
    lines.append("±: standard error over the items of the set")
  if any(row.best is not None for row in rows):
    lines.append(f"*: {BEST_NOTE}")
  return "\n".join(lines)


def fold_metrics(
  outcomes: Sequence[Outcome],
  rows: Sequence[MetricRow],
  further: Sequence[str] = (),
) -> Details:
  """The collapsed table of all metrics with errors; a star marks the best.

  Skips encoders without results. `further` is an optional last column, header
  first.
  """
  with_results = [i for i, outcome in enumerate(outcomes) if outcome.results]
  names = [outcomes[i].name for i in with_results]
  lines = [["evaluation", "metric", *names, "chance"]]
  for row in rows:
    line = [row.evaluation, row.label]
    for i in with_results:
      text = format_value(row.values[i], row.unit, row.errors[i])
      line.append(text + " *" * (i == row.best))
    chance = "" if row.chance is None else format_value(row.chance, row.unit)
    lines.append([*line, chance])
  if further:
    lines = [[*line, cell] for line, cell in zip(lines, further, strict=True)]
  has_best = any(row.best is not None for row in rows)
  note = _METRICS_NOTE + f" *: {BEST_NOTE}." * has_best
  blocks = [Table(lines, numbers=2), Note(note)]
  return Details(f"All {len(rows)} metrics", blocks)


class Protocols(NamedTuple):
  """Protocols of several encoders for one evaluation."""

  common: dict[str, Any]  # equal entries
  differing: dict[str, list[Any]]  # a value per encoder, None if absent
  encoders: list[str]  # encoders with a result

  def tables(self) -> list[list[list[str]]]:
    """Tables of common and, if any, differing entries, header first."""
    common = [[k, format_entry(v)] for k, v in self.common.items()]
    tables = [[["protocol", ""], *common]]
    if self.differing:
      differing = self.differing.items()
      rows = [[k, *map(format_entry, v)] for k, v in differing]
      tables.append([["differs", *self.encoders], *rows])
    return tables


def compare_protocols(outcomes: Sequence[Outcome], name: str) -> Protocols:
  """Compares protocols of an evaluation; skips entries of the encoders."""
  outcomes = [outcome for outcome in outcomes if name in outcome.results]
  protocols = [outcome.results[name].protocol for outcome in outcomes]
  common, differing = {}, {}
  for key in dict.fromkeys(k for p in protocols for k in p):
    # Results from JSON have lists, new results have tuples.
    values = [jsonable(p.get(key, _ABSENT)) for p in protocols]
    encoders = [jsonable(o.protocol.get(key, _ABSENT)) for o in outcomes]
    if values == encoders:
      continue
    if all(value == values[0] for value in values):
      common[key] = values[0]
    else:
      differing[key] = [None if v == _ABSENT else v for v in values]
  return Protocols(common, differing, [outcome.name for outcome in outcomes])


def list_differing(outcomes: Sequence[Outcome], name: str) -> list[str]:
  """A line per protocol entry that makes an evaluation incomparable."""
  _, differing, encoders = compare_protocols(outcomes, name)
  lines = []
  for key in ("data_hash", *COMPARED):
    by_value: dict[str, list[str]] = {}
    for value, encoder in zip(differing.get(key, ()), encoders, strict=False):
      by_value.setdefault(format_entry(value), []).append(encoder)
    parts = [f"{value} in {', '.join(ns)}" for value, ns in by_value.items()]
    if parts:
      lines.append(f"{name}: {key} {'; '.join(parts)}")
  return lines


def format_entry(value: Any) -> str:
  """Formats a protocol value on one line; abbreviates long lists."""
  if isinstance(value, list | tuple) and len(value) > 8:
    return f"{len(value)}: {value[0]!r}, {value[1]!r}, ... {value[-1]!r}"
  if isinstance(value, Mapping):
    entries = {k: v for k, v in value.items() if v is not None}
    return ", ".join(f"{k} {format_entry(v)}" for k, v in entries.items())
  if isinstance(value, list | tuple):
    return " ".join(map(format_entry, value))
  return "-" if value is None else str(value)


def format_metric_value(
  value: float, metric: Metric, *, signed: bool = False
) -> str:
  """A value in the metric's displayed unit, without the unit."""
  return format_metric(
    metric.scale * value, metric.unit, digits=1, signed=signed
  )


def format_interval(
  low: float | None, high: float | None, metric: Metric
) -> str:
  """An interval as `low, high`; "" if unknown."""
  if low is None or high is None:
    return ""
  return ", ".join(
    format_metric_value(v, metric, signed=True) for v in (low, high)
  )


def format_difference(c: Contrast, *, unit: bool = False) -> str:
  """Difference and 95 % interval."""
  ends = format_interval(c.low, c.high, c.metric)
  text = format_metric_value(c.difference, c.metric, signed=True)
  if unit and c.metric.unit:
    text += " points" if c.metric.unit == "%" else f" {c.metric.unit}"
  return f"{text} [{ends}]" if ends else text


def format_p(p: float | None) -> str:
  """A p value; a dash if there is no test."""
  return EMPTY if p is None else f"{p:.2g}"


def differences_table(compared: Sequence[Comparison]) -> list[list[str]]:
  """Differences, intervals and verdicts: a header, then a row per metric."""
  pairs = dict.fromkeys((c.arm, c.baseline) for c in compared)
  has_several = len({baseline for _, baseline in pairs}) > 1
  rows: dict[Metric, list[str]] = {}
  for c in compared:
    text = c.verdict
    if c.difference is not None:
      text = format_difference(c)
      text += f"\n{c.verdict}" * (c.p_holm is not None)
    rows.setdefault(c.metric, [c.metric.label]).append(text)
  header = [f"{arm} − {base}" if has_several else arm for arm, base in pairs]
  return [["metric", *header], *rows.values()]


def list_contrasts(
  rows: Sequence[tuple[str, Contrast]], without: Sequence[str] = ()
) -> Details:
  """A collapsed `contrast_table`."""
  table = Table(contrast_table(rows, without))
  return Details("Intervals and p values", [table])


def contrast_table(
  rows: Sequence[tuple[str, Contrast]], without: Sequence[str] = ()
) -> list[list[str]]:
  """Named contrasts: a header, then a row each; drops the columns `without`."""
  header = ["comparison", "metric", "difference", "95 %", "covers", "seeds"]
  table = [[*header, "p", "p Holm", "verdict", "note"]]
  for name, c in rows:
    row = [name, c.metric.label, EMPTY]
    if c.difference is not None:
      row[-1] = format_metric_value(c.difference, c.metric, signed=True)
    row.append(format_interval(c.low, c.high, c.metric) or EMPTY)
    row += [c.covers or EMPTY, str(c.n), format_p(c.p), format_p(c.p_holm)]
    table.append([*row, c.verdict, c.note])
  columns = [k for k, column in enumerate(table[0]) if column not in without]
  return [[line[k] for k in columns] for line in table]
