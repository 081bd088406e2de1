"""Figures as text and as Markdown, with chance and protocol beside them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome, jsonable

NOTHING = "-"
# Evaluations whose figures are neither better nor worse.
DESCRIPTIONS = ("patch_pca",)
# What must be equal beside the data for one figure to be called better.
_RULES = ("protocol", "train_hash", "train_data_hash")
_ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class Row:
  """One metric of one evaluation, for each of several encoders.

  Attributes:
    evaluation: its name.
    metric: its name.
    unit: `%` of a fraction, else the metric's own ("m", or "" for none).
    lower: whether less is better.
    chance: what a random encoder expects, in `unit`, if known.
    values: in `unit`, one an encoder; None where there is none, or none on
      the same data.
    best: of several values under one protocol and training set, the best.
  """

  evaluation: str
  metric: str
  unit: str
  lower: bool
  chance: float | None
  values: tuple[float | None, ...]
  best: float | None


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
  """Every figure of the evaluations of several encoders, in order.

  A figure on other data than the first encoder's is left out: it would stand
  in one row with what it can't be compared with.
  """
  found = []
  for name in evaluations(outcomes):
    results = [outcome.results.get(name) for outcome in outcomes]
    first = next(r for r in results if r is not None)
    results = [r if _same_data(r, first) else None for r in results]
    metrics = dict.fromkeys(m for r in results if r for m in r.metrics)
    for metric in metrics:
      holder = next(r for r in results if r and metric in r.metrics)
      found.append(_row(name, metric, holder, results))
  return found


def evaluations(outcomes: Sequence[Outcome]) -> list[str]:
  """The names of all that has a result, in order of appearance."""
  return list(dict.fromkeys(name for o in outcomes for name in o.results))


def _same_data(result: Result | None, first: Result) -> bool:
  key = "data_hash"
  return bool(result) and result.protocol.get(key) == first.protocol.get(key)


def _row(
  name: str, metric: str, holder: Result, results: Sequence[Result | None]
) -> Row:
  unit = holder.units.get(metric, "%")
  scale = 100.0 if unit == "%" else 1.0

  def scaled(value: float | None) -> float | None:
    there = value is not None and math.isfinite(value)
    return scale * value if there else None

  values = tuple(scaled(r and r.metrics.get(metric)) for r in results)
  comparable = name not in DESCRIPTIONS and _same_rules(results)
  better = min if metric in holder.lower else max
  return Row(
    evaluation=name,
    metric=metric,
    unit=unit,
    lower=metric in holder.lower,
    chance=scaled(holder.chance.get(metric)),
    values=values,
    best=_best(values, better) if comparable else None,
  )


def _same_rules(results: Sequence[Result | None]) -> bool:
  """Whether all learnt from the same images by the same protocol."""
  rules = [
    [result.protocol.get(key) for key in _RULES] for result in results if result
  ]
  return all(rule == rules[0] for rule in rules)


def _best(
  values: Sequence[float | None], choose: Callable[[list[float]], float]
) -> float | None:
  """The best value, where there are several to choose from."""
  known = [v for v in values if v is not None]
  return choose(known) if len(known) > 1 else None


def figure(value: float | None, unit: str) -> str:
  """Two decimals of a percentage, three of anything else of common size."""
  if value is None:
    return NOTHING
  if unit == "%":
    return f"{value:.2f}"
  common = value == 0 or 0.01 <= abs(value) < 1000
  return f"{value:.3f}" if common else f"{value:.4g}"


def table(results: Mapping[str, Result]) -> str:
  """Figures of one encoder with chance beside them, then each protocol."""
  return terminal(
    [Outcome(name="value", encoder="", weights="", results={**results})]
  )


def terminal(outcomes: Sequence[Outcome]) -> str:
  """Figures, a column an encoder, with chance; then each protocol."""
  lines = [text(outcomes)]
  for outcome in outcomes:
    if outcome.protocol:
      lines.append(f"\n{outcome.name}:")
      lines += [f"  {k}: {short(v)}" for k, v in outcome.protocol.items()]
  for name in evaluations(outcomes):
    shown = protocol(outcomes, name)
    lines.append(f"\n{name}:")
    lines += [f"  {key}: {short(value)}" for key, value in shown.common.items()]
    for key, values in shown.own.items():
      for whose, value in zip(shown.names, values, strict=True):
        lines.append(f"  {key} of {whose}: {short(value)}")
  return "\n".join(lines)


def text(outcomes: Sequence[Outcome]) -> str:
  """A table for a terminal, a column an encoder."""
  cells = [("evaluation", "metric", "unit", *_names(outcomes), "chance")]
  for row in rows(outcomes):
    unit = f"{row.unit} (lower)".strip() if row.lower else row.unit
    values = [figure(v, row.unit) for v in row.values]
    chance = "" if row.chance is None else figure(row.chance, row.unit)
    cells.append((row.evaluation, row.metric, unit, *values, chance))
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = []
  for line in cells:
    padded = [
      f"{cell:<{width}}" if i < 3 else f"{cell:>{width}}"
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    lines.append("  ".join(padded).rstrip())
  lines.insert(1, "-" * max(map(len, lines)))
  return "\n".join(lines)


def _names(outcomes: Sequence[Outcome]) -> list[str]:
  return [outcome.name for outcome in outcomes]


def markdown(outcomes: Sequence[Outcome]) -> str:
  """The same table in Markdown; the best of several encoders is bold."""
  header = ["evaluation", "metric", *_names(outcomes), "chance"]
  lines = [markdown_line(header), "|---|---|" + "---:|" * (len(header) - 2)]
  for row in rows(outcomes):
    values = []
    for value in row.values:
      shown = with_unit(value, row.unit)
      best = value is not None and value == row.best
      values.append(f"**{shown}**" if best else shown)
    chance = "" if row.chance is None else with_unit(row.chance, row.unit)
    metric = f"{row.metric} ↓" if row.lower else row.metric
    lines.append(markdown_line([row.evaluation, metric, *values, chance]))
  return "\n".join(lines)


def with_unit(value: float | None, unit: str) -> str:
  """A figure as people write it: `50.00 %`, `0.469 m`."""
  shown = figure(value, unit)
  return shown if value is None or not unit else f"{shown} {unit}"


def encoder_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
  """What the encoders are and read: a header, then a column each."""
  rows = [
    ["", *_names(outcomes)],
    ["encoder", *(o.encoder or NOTHING for o in outcomes)],
    ["weights", *(o.weights for o in outcomes)],
    ["mtv_jax", *(o.version for o in outcomes)],
  ]
  keys = dict.fromkeys(k for o in outcomes for k in o.protocol)
  for key in (k for k in keys if k not in ("encoder", "weights")):
    rows.append([key, *(short(o.protocol.get(key)) for o in outcomes)])
  return rows


def markdown_grid(rows: Sequence[Sequence[str]]) -> str:
  """A table of a header and rows."""
  lines = [markdown_line(row) for row in rows]
  return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def markdown_line(cells: Sequence[str]) -> str:
  """One row of a Markdown table."""
  escaped = [c.replace("|", "\\|").replace("\n", " ") for c in cells]
  return f"| {' | '.join(escaped)} |"


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How one evaluation was done for several encoders.

  Attributes:
    common: what was the same for all of them.
    own: what was not: by key, a value an encoder (None where it has none).
    names: of the encoders that have a result, in the order of those values.
  """

  common: dict[str, Any]
  own: dict[str, list[Any]]
  names: list[str]


def protocol(outcomes: Sequence[Outcome], name: str) -> Protocol:
  """What the encoders' protocols of an evaluation share, and what not.

  Without what is the encoder's own protocol, which is shown once for all.
  """
  able = [outcome for outcome in outcomes if name in outcome.results]
  protocols = [outcome.results[name].protocol for outcome in able]
  common, own = {}, {}
  for key in dict.fromkeys(k for p in protocols for k in p):
    # JSON, by which an earlier one has come, has no tuples.
    values = [jsonable(p.get(key, _ABSENT)) for p in protocols]
    encoders = [jsonable(o.protocol.get(key, _ABSENT)) for o in able]
    if values == encoders:
      continue
    if all(value == values[0] for value in values):
      common[key] = values[0]
    else:
      own[key] = [None if v == _ABSENT else v for v in values]
  return Protocol(common, own, [outcome.name for outcome in able])


def markdown_protocol(outcomes: Sequence[Outcome], name: str) -> str:
  """A list of what is common, and a table of what is not."""
  shown = protocol(outcomes, name)
  lines = [f"- {key}: {short(value)}" for key, value in shown.common.items()]
  if shown.own:
    rows = [[k, *map(short, values)] for k, values in shown.own.items()]
    lines += ["", markdown_grid([["", *shown.names], *rows])]
  return "\n".join(lines)


def short(value: Any) -> str:
  """A protocol's value on a line; of a long list its ends."""
  if isinstance(value, list | tuple) and len(value) > 8:
    return f"{len(value)}: {value[0]!r}, {value[1]!r}, ... {value[-1]!r}"
  if isinstance(value, Mapping):
    return json.dumps(value, default=str)
  return NOTHING if value is None else str(value)
