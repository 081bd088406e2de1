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
# `Row.best` needs equal values of these protocol keys, and equal data.
_COMPARED = ("protocol", "train_hash", "train_data_hash")
_ABSENT = "(absent)"


class Row(NamedTuple):
  """One metric of one evaluation for several encoders."""

  evaluation: str
  metric: str
  unit: str  # `%` of a fraction, else the metric's own ("m", or "")
  lower: bool  # whether lower is better
  chance: float | None  # expected of a random encoder
  values: tuple[float | None, ...]  # None if missing or from other data
  best: float | None  # None if the protocols differ


def compare(outcomes: Sequence[Outcome]) -> list[Row]:
  """Every metric of several encoders, in order.

  Results on other data than the first encoder's are left out: the values of a
  row are comparable.
  """
  rows = []
  for name in evaluation_names(outcomes):
    results = [outcome.results.get(name) for outcome in outcomes]
    first = next(r for r in results if r is not None)
    data = first.protocol.get("data_hash")
    results = [
      r if r and r.protocol.get("data_hash") == data else None for r in results
    ]
    for metric in dict.fromkeys(m for r in results if r for m in r.metrics):
      rows.append(_row(name, metric, results))
  return rows


def evaluation_names(outcomes: Sequence[Outcome]) -> list[str]:
  """The evaluations that have a result, in order of appearance."""
  return list(dict.fromkeys(name for o in outcomes for name in o.results))


def _row(name: str, metric: str, results: Sequence[Result | None]) -> Row:
  present = [result for result in results if result]
  example = next(r for r in present if metric in r.metrics)
  unit = example.units.get(metric, "%")
  lower = metric in example.lower

  def scaled(value: float | None) -> float | None:
    known = value is not None and math.isfinite(value)
    return (100.0 if unit == "%" else 1.0) * value if known else None

  values = tuple(scaled(r and r.metrics.get(metric)) for r in results)
  known = [v for v in values if v is not None]
  protocols = [[r.protocol.get(key) for key in _COMPARED] for r in present]
  best = None
  is_comparable = len(known) > 1 and name not in DESCRIPTIVE
  if is_comparable and all(protocol == protocols[0] for protocol in protocols):
    best = min(known) if lower else max(known)
  chance = scaled(example.chance.get(metric))
  return Row(name, metric, unit, lower, chance, values, best)


def format_number(value: float | None, unit: str) -> str:
  """Two decimals of a percentage, three of other numbers of common size."""
  if value is None:
    return _EMPTY
  if unit == "%":
    return f"{value:.2f}"
  common = value == 0 or 0.01 <= abs(value) < 1000
  return f"{value:.3f}" if common else f"{value:.4g}"


def format_value(value: float | None, unit: str) -> str:
  """A number with its unit: `50.00 %`, `0.469 m`."""
  text = format_number(value, unit)
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


def format_metrics(outcomes: Sequence[Outcome]) -> str:
  """The metrics as a text table with a column for each encoder."""
  names = [outcome.name for outcome in outcomes]
  cells = [("evaluation", "metric", "unit", *names, "chance")]
  for row in compare(outcomes):
    unit = f"{row.unit} (lower)".strip() if row.lower else row.unit
    values = [format_number(v, row.unit) for v in row.values]
    chance = "" if row.chance is None else format_number(row.chance, row.unit)
    cells.append((row.evaluation, row.metric, unit, *values, chance))
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  aligned = [f"{{:{'<' if i < 3 else '>'}{w}}}" for i, w in enumerate(widths)]
  lines = ["  ".join(aligned).format(*line).rstrip() for line in cells]
  lines.insert(1, "-" * max(map(len, lines)))
  return "\n".join(lines)


def metrics_table(outcomes: Sequence[Outcome]) -> list[list[str]]:
  """The metrics: a header, then rows; the best of several values is bold."""
  names = [outcome.name for outcome in outcomes]
  lines = [["evaluation", "metric", *names, "chance"]]
  for row in compare(outcomes):
    texts = [format_value(v, row.unit) for v in row.values]
    line = [
      Link(row.evaluation),
      f"{row.metric} ↓" if row.lower else row.metric,
    ]
    for value, text in zip(row.values, texts, strict=True):
      is_best = value is not None and value == row.best
      line.append(Bold(text) if is_best else text)
    chance = "" if row.chance is None else format_value(row.chance, row.unit)
    lines.append([*line, chance])
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


def shorten(value: Any) -> str:
  """A protocol's value as one line; long lists by their ends."""
  if isinstance(value, list | tuple) and len(value) > 8:
    return f"{len(value)}: {value[0]!r}, {value[1]!r}, ... {value[-1]!r}"
  if isinstance(value, Mapping):
    return json.dumps(value, default=str)
  return _EMPTY if value is None else str(value)
