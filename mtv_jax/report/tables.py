"""Metrics of several encoders: rows with verdicts, as text and as tables."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome, jsonable
from mtv_jax.report import contrasts
from mtv_jax.report.contrasts import Comparison, Metric
from mtv_jax.report.page import Bold, Link
from mtv_jax.utils.text import align_columns, format_metric

# Evaluations whose metrics lack a better direction.
DESCRIPTIVE = ("patch_pca",)
# Main metrics, which have charts; by default an evaluation's first metric.
_MAIN = {
  "geometric_correspondence": ("avg_recall",),
  "retrieval": ("text_to_image_r1", "image_to_text_r1"),
  **dict.fromkeys(DESCRIPTIVE, ()),
}
_EMPTY = "-"
# Protocol keys that must be equal for `MetricRow.best`, besides the data.
_COMPARED = ("protocol", "options", "train_hash", "train_data_hash", "regions")
_ABSENT = "(absent)"

BEST_NOTE = (
  "is better than every other value and than chance: the 95 % interval of the "
  "difference over the items, paired if both results have resamples, excludes "
  "0, and p, corrected for the comparisons of the main or of the further "
  "metrics (Holm 1979), is below 0.05; marked only where all results have the "
  "same protocol, options and data"
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
  best: int | None = None  # index of the best value, see `BEST_NOTE`
  # Number of the protocol, from 1, if the evaluation has several; else 0.
  variant: int = 0
  # Differences from the baseline, if the baseline has a value.
  differences: tuple[Comparison, ...] = ()

  @property
  def label(self) -> str:
    """Metric, protocol number and direction."""
    protocol = f" (protocol {self.variant})" if self.variant else ""
    return f"{self.metric}{protocol}{' ↓' if self.lower else ''}"


def is_main(evaluation: str, metric: str, metrics: Sequence[str]) -> bool:
  """Whether a metric is a main metric; `metrics` are its evaluation's."""
  return metric in _MAIN.get(evaluation, tuple(metrics)[:1])


def compare(
  outcomes: Sequence[Outcome],
  *,
  split: bool = False,
  baseline: int | None = None,
) -> list[MetricRow]:
  """Every metric of several encoders, in order.

  A row has only comparable values: it skips results on different data than the
  first result's. With `split`, results that differ in data, protocol or options
  get separate rows. `baseline` is the index of the encoder to subtract.
  """
  rows, members = [], []
  for name in evaluation_names(outcomes):
    results = [outcome.results.get(name) for outcome in outcomes]
    keys = [r and protocol_key(r, whole=split) for r in results]
    groups = list(dict.fromkeys(key for key in keys if key is not None))
    for number, group in enumerate(groups if split else groups[:1], 1):
      chosen = [
        r if key == group else None
        for r, key in zip(results, keys, strict=True)
      ]
      variant = number if split and len(groups) > 1 else 0
      for metric in dict.fromkeys(m for r in chosen if r for m in r.metrics):
        rows.append(_row(name, metric, chosen)._replace(variant=variant))
        members.append(chosen)
  return _add_verdicts(rows, members, outcomes, baseline)


def protocol_key(result: Result, *, whole: bool = True) -> str:
  """A key that is equal for results on equal data, which may share a row.

  With `whole`, protocols and options must be equal too.
  """
  keys = ["data_hash", *_COMPARED] if whole else ["data_hash"]
  values = [jsonable(result.protocol.get(key)) for key in keys]
  return json.dumps(values, default=str)


def evaluation_names(outcomes: Sequence[Outcome]) -> list[str]:
  """Names of evaluations with results, in order of appearance."""
  return list(dict.fromkeys(name for o in outcomes for name in o.results))


def _row(name: str, metric: str, results: Sequence[Result | None]) -> MetricRow:
  example = next(r for r in results if r and metric in r.metrics)
  unit = example.units.get(metric, "%")

  def scaled(value: float | None) -> float | None:
    value = math.nan if value is None else value
    value *= 100.0 if unit == "%" else 1.0
    return value if math.isfinite(value) else None

  return MetricRow(
    name,
    metric,
    unit,
    metric in example.lower,
    scaled(example.chance.get(metric)),
    tuple(scaled(r and r.metrics.get(metric)) for r in results),
    tuple(scaled(r and r.errors.get(metric)) for r in results),
    is_main(name, metric, [*example.metrics]),
  )


def _add_verdicts(
  rows: Sequence[MetricRow],
  members: Sequence[Sequence[Result | None]],
  outcomes: Sequence[Outcome],
  baseline: int | None,
) -> list[MetricRow]:
  """Adds the best value and the differences from the baseline to each row.

  Contrasts each value with the row's leading value and with the baseline's.
  Contrasts of main metrics are one family for Holm's correction, contrasts of
  all other metrics a second one.
  """
  leading = [_find_leading(*pair) for pair in zip(rows, members, strict=True)]
  data = [_measure(*pair) for pair in zip(rows, members, strict=True)]
  names = [outcome.name for outcome in outcomes]
  # By (row, arm, reference) indices, in both orders of arm and reference.
  compared: dict[tuple[int, int, int], Comparison] = {}
  for main in (True, False):
    family = {}
    for k, row in enumerate(rows):
      if row.is_main != main or row.evaluation in DESCRIPTIVE:
        continue
      known = {i for i, value in enumerate(row.values) if value is not None}
      for j in {baseline, leading[k]} & known:
        for i in range(len(names)):
          if i != j and (k, j, i) not in family:
            c = contrasts.compare_arms(*data[k], str(i), str(j))
            c = dataclasses.replace(c, arm=names[i], baseline=names[j])
            family[k, i, j] = c
    corrected = contrasts.correct_contrasts(family.values())
    for (k, i, j), c in zip(family, corrected, strict=True):
      compared[k, i, j], compared[k, j, i] = c, c.reverse()
  judged = []
  for k, row in enumerate(rows):
    best = leading[k]
    if best is not None:
      verdicts = {
        c.verdict for (n, i, _), c in compared.items() if (n, i) == (k, best)
      }
      is_best = verdicts <= {contrasts.BETTER, contrasts.MISSING}
      best = best if is_best and _beats_chance(*data[k], str(best)) else None
    differences = tuple(
      compared[k, i, baseline]
      for i in range(len(names))
      if (k, i, baseline) in compared
    )
    judged.append(row._replace(best=best, differences=differences))
  return judged


def _measure(
  row: MetricRow, results: Sequence[Result | None]
) -> tuple[contrasts.ArmMeasurements, Metric]:
  """Measurements and metric for a row's contrasts; arms are indices."""
  arms = {
    str(i): {0: {row.evaluation: result}}
    for i, result in enumerate(results)
    if result
  }
  return contrasts.collect_measurements(arms), describe_metric(row)


def describe_metric(row: MetricRow) -> Metric:
  """The `Metric` of a row, with chance in stored units."""
  name = f"{row.evaluation}/{row.metric}"
  metric = Metric(name, unit=row.unit, lower=row.lower)
  chance = None if row.chance is None else row.chance / metric.scale
  return dataclasses.replace(metric, chance=chance)


def _find_leading(
  row: MetricRow, results: Sequence[Result | None]
) -> int | None:
  """Index of the best of several values, if their protocols are equal."""
  known = [i for i, value in enumerate(row.values) if value is not None]
  protocols = [
    [jsonable(r.protocol.get(key)) for key in _COMPARED] for r in results if r
  ]
  if row.evaluation in DESCRIPTIVE or len(known) < 2:
    return None
  if any(protocol != protocols[0] for protocol in protocols):
    return None
  return (min if row.lower else max)(known, key=lambda i: row.values[i])


def _beats_chance(
  data: contrasts.ArmMeasurements, metric: Metric, arm: str
) -> bool:
  if metric.chance is None:
    return True
  c = contrasts.estimate_contrast(data, metric, {arm: 1.0}, -metric.chance)
  return c.verdict == contrasts.BETTER


def format_value(
  value: float | None, unit: str, error: float | None = None
) -> str:
  """Formats a value with its unit: `50.00 %`, `0.469 ± 0.012 m`."""
  text = format_metric(value, unit, error)
  return text if value is None or not unit else f"{text} {unit}"


def format_results(outcomes: Sequence[Outcome]) -> str:
  """Formats results for a terminal: metrics with chance, then protocols."""
  lines = [format_metrics(outcomes)]
  for outcome in outcomes:
    if outcome.protocol:
      lines.append(f"\n{outcome.name}:")
      lines += [
        f"  {k}: {format_entry(v)}" for k, v in outcome.protocol.items()
      ]
  for name in evaluation_names(outcomes):
    protocol = compare_protocols(outcomes, name)
    lines.append(f"\n{name}:")
    lines += [
      f"  {key}: {format_entry(v)}" for key, v in protocol.common.items()
    ]
    for key, values in protocol.differing.items():
      for encoder, value in zip(protocol.encoders, values, strict=True):
        lines.append(f"  {key} of {encoder}: {format_entry(value)}")
  return "\n".join(lines)


def format_encoder(results: Mapping[str, Result]) -> str:
  """`format_results` of one encoder."""
  return format_results(
    [Outcome(name="value", encoder="", weights="", results={**results})]
  )


def format_metrics(
  outcomes: Sequence[Outcome],
  *,
  split: bool = False,
  baseline: int | None = None,
) -> str:
  """Formats metrics as a text table with a column per encoder.

  Standard errors follow the values; a star marks the best of several.
  """
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


def metrics_table(
  outcomes: Sequence[Outcome],
  rows: Sequence[MetricRow] | None = None,
  further: Sequence[str] | None = None,
) -> list[list[str]]:
  """Metrics with errors: a header, then rows; `MetricRow.best` is bold.

  Has a column per outcome; `further` is an optional last column, header first.
  """
  names = [outcome.name for outcome in outcomes]
  lines = [["evaluation", "metric", *names, "chance"]]
  for row in compare(outcomes) if rows is None else rows:
    texts = [
      format_value(value, row.unit, error)
      for value, error in zip(row.values, row.errors, strict=True)
    ]
    line = [Link(row.evaluation), row.label]
    line += [Bold(t) if i == row.best else t for i, t in enumerate(texts)]
    chance = "" if row.chance is None else format_value(row.chance, row.unit)
    lines.append([*line, chance])
  if further is not None:
    lines = [[*line, cell] for line, cell in zip(lines, further, strict=True)]
  return lines


def encoder_table(outcomes: Sequence[Outcome]) -> list[list[str]]:
  """Properties of the encoders: a header, then rows; a column per encoder."""
  columns = []
  for o in outcomes:
    column = {"": o.name, "encoder": o.encoder or _EMPTY, "weights": o.weights}
    columns.append({**o.protocol, **column, "mtv_jax": o.version})
  keys = dict.fromkeys(["", "encoder", "weights", "mtv_jax"])
  keys |= dict.fromkeys(key for column in columns for key in column)
  return [[key, *(format_entry(c.get(key)) for c in columns)] for key in keys]


class Protocols(NamedTuple):
  """Protocols of several encoders for one evaluation."""

  common: dict[str, Any]  # equal entries
  differing: dict[str, list[Any]]  # a value per encoder, None if absent
  encoders: list[str]  # encoders with a result

  def tables(self) -> list[list[list[str]]]:
    """Tables of common and, if any, differing entries, header first."""
    common = [[key, format_entry(value)] for key, value in self.common.items()]
    tables = [[["protocol", ""], *common]]
    if self.differing:
      rows = [[k, *map(format_entry, v)] for k, v in self.differing.items()]
      tables.append([["differs", *self.encoders], *rows])
    return tables


def compare_protocols(outcomes: Sequence[Outcome], name: str) -> Protocols:
  """Compares the protocols of an evaluation, without the encoders' entries."""
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
  for key in ("data_hash", *_COMPARED):
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
    return json.dumps(value, default=str)
  return _EMPTY if value is None else str(value)
