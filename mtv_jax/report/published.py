"""Compares results with the figures published for their checkpoints.

A figure is matched to a metric by the encoder's declared checkpoint and by the
whole data set. The report gives each figure's source and known protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.published import COLUMNS, FIGURES, Figure, matching_column
from mtv_jax.report import tables
from mtv_jax.report.page import Bullets, Heading, Note, PageBlock, Table
from mtv_jax.report.tables import MetricRow
from mtv_jax.utils.text import format_metric


class FigureMatch(NamedTuple):
  """A result and the figure published for its checkpoint."""

  encoder: int  # index of the outcome
  row: MetricRow
  column: str  # key of `published.COLUMNS`
  figure: Figure


def find_matches(
  outcomes: Sequence[Outcome], rows: Sequence[MetricRow]
) -> list[FigureMatch]:
  """Matches results with figures published for their checkpoints, by row."""
  matches = []
  for row in rows:
    for i, outcome in enumerate(outcomes):
      figures = FIGURES.get(outcome.checkpoint, {})
      if row.values[i] is None:
        continue
      protocol = outcome.results[row.evaluation].protocol
      column = matching_column(row.evaluation, row.metric, protocol)
      if column in figures:
        matches.append(FigureMatch(i, row, column, figures[column]))
  return matches


def describe_matches(
  outcomes: Sequence[Outcome], matches: Sequence[FigureMatch]
) -> Iterator[PageBlock]:
  """Published figures and results, sources and protocol differences."""
  if not any(outcome.checkpoint for outcome in outcomes):
    return
  yield Heading("Published figures")
  lines = [
    f"{o.name} is compared with figures published for {o.checkpoint}."
    for o in outcomes
    if o.checkpoint
  ]
  if matches:
    yield Table(_table(outcomes, matches), numbers=2)
  yield Bullets([*lines, *_differences(outcomes, matches)])
  if other := [*_other_data(outcomes, matches)]:
    yield Note("Published, but not on the data of this comparison:")
    yield Bullets(other)


def _table(
  outcomes: Sequence[Outcome], matches: Sequence[FigureMatch]
) -> list[list[str]]:
  lines = [["metric", "encoder", "here", "published", "difference"]]
  for match in matches:
    unit, value = match.row.unit, match.row.values[match.encoder]
    difference = format_metric(value - match.figure.value, unit)
    lines.append(
      [
        COLUMNS[match.column].label,
        outcomes[match.encoder].name,
        tables.format_value(value, unit, match.row.errors[match.encoder]),
        format_figure(match),
        difference,
      ]
    )
  return lines


def format_figure(match: FigureMatch) -> str:
  """A figure with its unit: one decimal for "%", else three."""
  unit = match.row.unit
  digits = f"{match.figure.value:.1f}" if unit == "%" else ""
  return f"{digits or f'{match.figure.value:.3f}'} {unit}".strip()


def _differences(
  outcomes: Sequence[Outcome], matches: Sequence[FigureMatch]
) -> Iterator[str]:
  """A line per figure: source, protocol, differences from it."""
  for match in matches:
    outcome, figure = outcomes[match.encoder], match.figure
    protocol = outcome.results[match.row.evaluation].protocol
    differing = [
      f"{key} is {tables.format_entry(protocol[key])}, not {value}"
      for key, value in figure.entries.items()
      if protocol.get(key, value) != value
    ]
    here = f" Here {', '.join(differing)}." if differing else ""
    yield (
      f"{COLUMNS[match.column].label}, {outcome.name}: "
      f"{format_figure(match)} is of {figure.source}. "
      f"Its protocol: {figure.protocol}.{here}"
    )


def _other_data(
  outcomes: Sequence[Outcome], matches: Sequence[FigureMatch]
) -> Iterator[str]:
  """A line per figure whose evaluation ran on different data."""
  shown = {(match.encoder, match.column) for match in matches}
  for i, outcome in enumerate(outcomes):
    for name in FIGURES.get(outcome.checkpoint, {}):
      column = COLUMNS[name]
      result = outcome.results.get(column.evaluation)
      if result is not None and (i, name) not in shown:
        data = ", ".join(
          f"{key} {tables.format_entry(result.protocol.get(key))}"
          for key in ("data", "images", "train_images")
          if key in result.protocol
        )
        yield f"{column.label}, {outcome.name}: here {data}."
