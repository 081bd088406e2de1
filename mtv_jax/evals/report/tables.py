"""Tables of results: rows of several encoders, as text and as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome, jsonable
from mtv_jax.utils.html import Bold, Link

# Evaluations whose metrics are neither better nor worse.
DESCRIPTIVE = ("patch_pca",)
_EMPTY = "-"
# `MetricRow.best` needs equal values of these protocol keys, and equal data.
_COMPARED = ("protocol", "options", "train_hash", "train_data_hash", "regions")
_ABSENT = "(absent)"
# A difference of fewer standard errors marks nothing.
_DISTINCT = 2.0

BEST_NOTE = (
  "is better than every other value by more than 2 standard errors of the "
  "difference, sqrt(e1² + e2²), and than chance by more than 2 of its own; "
  "marked only where all results have the same protocol, options and data"
)


class MetricRow(NamedTuple):
  """One metric of one evaluation for several encoders."""

  evaluation: str
  metric: str
  unit: str  # `%` of a fraction, else the metric's own ("m", or "")
  lower: bool  # whether lower is better
  chance: float | None  # expected of a random encoder
  values: tuple[float | None, ...]  # None if missing or from other data
  errors: tuple[float | None, ...]  # standard errors; None if unknown
  best: int | None  # index of the value that `_find_best` selects
  # Which of the protocols, from 1, if an evaluation has several rows of a
  # metric; else 0.
  variant: int = 0

  @property
  def label(self) -> str:
    """The metric, and which protocol."""
    protocol = f" (protocol {self.variant})" if self.variant else ""
    return f"{self.metric}{protocol}{' ↓' if self.lower else ''}"


def compare(
  outcomes: Sequence[Outcome], *, split: bool = False
) -> list[MetricRow]:
  """Every metric of several encoders, in order.

  Results on other data than the first encoder's are left out: the values of a
  row are comparable. With `split` they have rows of their own, as have those
  of other protocols or options.
  """
  rows = []
  for name in evaluation_names(outcomes):
    results = [outcome.results.get(name) for outcome in outcomes]
    keys = [r and protocol_key(r, whole=split) for r in results]
    groups = list(dict.fromkeys(key for key in keys if key is not None))
    for number, group in enumerate(groups if split else groups[:1], 1):
      members = [
        r if key == group else None
        for r, key in zip(results, keys, strict=True)
      ]
      variant = number if split and len(groups) > 1 else 0
      for metric in dict.fromkeys(m for r in members if r for m in r.metrics):
        row = _row(name, metric, members)
        rows.append(row._replace(variant=variant))
  return rows


def protocol_key(result: Result, *, whole: bool = True) -> str:
  """Equal for results that a row may have: on the same data.

  With `whole` the protocols and options are the same too.
  """
  keys = ["data_hash", *_COMPARED] if whole else ["data_hash"]
  values = [jsonable(result.protocol.get(key)) for key in keys]
  return json.dumps(values, default=str)


def evaluation_names(outcomes: Sequence[Outcome]) -> list[str]:
  """The evaluations that have a result, in order of appearance."""
  return list(dict.fromkeys(name for o in outcomes for name in o.results))


def _row(name: str, metric: str, results: Sequence[Result | None]) -> MetricRow:
  present = [result for result in results if result]
  example = next(r for r in present if metric in r.metrics)
  unit = example.units.get(metric, "%")
  lower = metric in example.lower

  def scaled(value: float | None) -> float | None:
    known = value is not None and math.isfinite(value)
    return (100.0 if unit == "%" else 1.0) * value if known else None

  values = tuple(scaled(r and r.metrics.get(metric)) for r in results)
  errors = tuple(scaled(r and r.errors.get(metric)) for r in results)
  chance = scaled(example.chance.get(metric))
  protocols = [
    [jsonable(r.protocol.get(key)) for key in _COMPARED] for r in present
  ]
  best = None
  if name not in DESCRIPTIVE and all(p == protocols[0] for p in protocols):
    best = _find_best(values, errors, chance, sign=-1 if lower else 1)
  return MetricRow(name, metric, unit, lower, chance, values, errors, best)


def _find_best(
  values: Sequence[float | None],
  errors: Sequence[float | None],
  chance: float | None,
  *,
  sign: int,
) -> int | None:
  """Index of the one value that is distinctly better than all others.

  None unless it differs by 2 standard errors of the difference from each of
  them, and by 2 of its own from chance, where that is known. An unknown error
  is not zero: a value without one is not the best, nor is one beside it. Errors
  of two encoders on the same items are correlated, so that the rule is strict.
  """
  known = [i for i, value in enumerate(values) if value is not None]
  if len(known) < 2 or any(errors[i] is None for i in known):
    return None
  best = max(known, key=lambda i: sign * values[i])
  others = [(values[i], errors[i]) for i in known if i != best]
  others += [] if chance is None else [(chance, 0.0)]
  is_distinct = all(
    sign * (values[best] - value) > _DISTINCT * math.hypot(errors[best], error)
    for value, error in others
  )
  return best if is_distinct else None


def format_number(
  value: float | None, unit: str, error: float | None = None
) -> str:
  """Two decimals of a percentage, three of other numbers of common size.

  A known standard error follows: `71.30 ± 0.92`.
  """
  if value is None:
    return _EMPTY
  if unit == "%":
    return f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")
  common = value == 0 or 0.01 <= abs(value) < 1000
  text = f"{value:.3f}" if common else f"{value:.4g}"
  return text if error is None else f"{text} ± {error:.2g}"


def format_value(
  value: float | None, unit: str, error: float | None = None
) -> str:
  """A number with its unit: `50.00 %`, `0.469 ± 0.012 m`."""
  text = format_number(value, unit, error)
  return text if value is None or not unit else f"{text} {unit}"


def format_results(outcomes: Sequence[Outcome]) -> str:
  """Text for a terminal: metrics with chance, then each protocol."""
  lines = [format_metrics(outcomes)]
  for outcome in outcomes:
    if outcome.protocol:
      lines.append(f"\n{outcome.name}:")
      lines += [f"  {k}: {shorten(v)}" for k, v in outcome.protocol.items()]
  for name in evaluation_names(outcomes):
    protocol = compare_protocols(outcomes, name)
    lines.append(f"\n{name}:")
    lines += [f"  {key}: {shorten(v)}" for key, v in protocol.common.items()]
    for key, values in protocol.differing.items():
      for encoder, value in zip(protocol.encoders, values, strict=True):
        lines.append(f"  {key} of {encoder}: {shorten(value)}")
  return "\n".join(lines)


def format_encoder(results: Mapping[str, Result]) -> str:
  """`format_results` of one encoder."""
  return format_results(
    [Outcome(name="value", encoder="", weights="", results={**results})]
  )


def format_metrics(outcomes: Sequence[Outcome], *, split: bool = False) -> str:
  """The metrics as a text table with a column for each encoder.

  Values are followed by their standard errors; the best of several has a star.
  """
  names = [outcome.name for outcome in outcomes]
  cells = [("evaluation", "metric", "unit", *names, "chance")]
  rows = compare(outcomes, split=split)
  for row in rows:
    unit = f"{row.unit} (lower)".strip() if row.lower else row.unit
    values = [
      format_number(value, row.unit, error) + " *" * (i == row.best)
      for i, (value, error) in enumerate(
        zip(row.values, row.errors, strict=True)
      )
    ]
    chance = "" if row.chance is None else format_number(row.chance, row.unit)
    metric = row.label.removesuffix(" ↓")
    cells.append((row.evaluation, metric, unit, *values, chance))
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  aligned = [f"{{:{'<' if i < 3 else '>'}{w}}}" for i, w in enumerate(widths)]
  lines = ["  ".join(aligned).format(*line).rstrip() for line in cells]
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
  """The metrics with errors: a header, then rows; bold is `MetricRow.best`.

  Args:
    outcomes: a column each.
    rows: by default those of `compare`.
    further: cells of a last column, its header first.
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
  """What the encoders are: a header, then rows with a column for each."""
  columns = []
  for o in outcomes:
    column = {"": o.name, "encoder": o.encoder or _EMPTY, "weights": o.weights}
    columns.append({**o.protocol, **column, "mtv_jax": o.version})
  keys = dict.fromkeys(["", "encoder", "weights", "mtv_jax"])
  keys |= dict.fromkeys(key for column in columns for key in column)
  return [[key, *(shorten(c.get(key)) for c in columns)] for key in keys]


class Protocols(NamedTuple):
  """The protocols of several encoders for one evaluation."""

  common: dict[str, Any]  # equal entries
  differing: dict[str, list[Any]]  # one value per encoder, None if it lacks it
  encoders: list[str]  # with a result

  def tables(self) -> list[list[list[str]]]:
    """A table of each part that is not empty, a header first."""
    common = [[key, shorten(value)] for key, value in self.common.items()]
    tables = [[["protocol", ""], *common]]
    if self.differing:
      rows = [[k, *map(shorten, v)] for k, v in self.differing.items()]
      tables.append([["differs", *self.encoders], *rows])
    return tables


def compare_protocols(outcomes: Sequence[Outcome], name: str) -> Protocols:
  """The protocols of an evaluation, without the encoders' own entries."""
  outcomes = [outcome for outcome in outcomes if name in outcome.results]
  protocols = [outcome.results[name].protocol for outcome in outcomes]
  common, differing = {}, {}
  for key in dict.fromkeys(k for p in protocols for k in p):
    # Results read from JSON have lists, others tuples.
    values = [jsonable(p.get(key, _ABSENT)) for p in protocols]
    encoders = [jsonable(o.protocol.get(key, _ABSENT)) for o in outcomes]
    if values == encoders:
      continue
    if all(value == values[0] for value in values):
      common[key] = values[0]
    else:
      differing[key] = [None if v == _ABSENT else v for v in values]
  return Protocols(common, differing, [outcome.name for outcome in outcomes])


def describe_differences(outcomes: Sequence[Outcome], name: str) -> list[str]:
  """A line for each entry for which results of an evaluation don't compare."""
  _, differing, encoders = compare_protocols(outcomes, name)
  lines = []
  for key in ("data_hash", *_COMPARED):
    by_value: dict[str, list[str]] = {}
    for value, encoder in zip(differing.get(key, ()), encoders, strict=False):
      by_value.setdefault(shorten(value), []).append(encoder)
    parts = [f"{value} in {', '.join(ns)}" for value, ns in by_value.items()]
    if parts:
      lines.append(f"{name}: {key} {'; '.join(parts)}")
  return lines


def shorten(value: Any) -> str:
  """A protocol's value as one line; long lists by their ends."""
  if isinstance(value, list | tuple) and len(value) > 8:
    return f"{len(value)}: {value[0]!r}, {value[1]!r}, ... {value[-1]!r}"
  if isinstance(value, Mapping):
    return json.dumps(value, default=str)
  return _EMPTY if value is None else str(value)
