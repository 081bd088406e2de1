"""Results beside the figures that are published of their checkpoints.

A figure stands beside a metric of an encoder that is said to be the checkpoint,
on the same whole data set, with its source and with what is known of its
protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.published import COLUMNS, FIGURES, Figure, matching_column
from mtv_jax.report import tables
from mtv_jax.report.page import Block, Bullets, Heading, Note, Table
from mtv_jax.report.tables import MetricRow
from mtv_jax.utils.text import format_metric


class Match(NamedTuple):
  """A result and the figure that is published of its checkpoint."""

  encoder: int  # index of the outcome
  row: MetricRow
  column: str  # of `published.COLUMNS`
  figure: Figure


def find_matches(
  outcomes: Sequence[Outcome], rows: Sequence[MetricRow]
) -> list[Match]:
  """Figures that are published of the outcomes' checkpoints, by row."""
  matches = []
  for row in rows:
    for i, outcome in enumerate(outcomes):
      figures = FIGURES.get(outcome.checkpoint, {})
      if row.values[i] is None:
        continue
      protocol = outcome.results[row.evaluation].protocol
      column = matching_column(row.evaluation, row.metric, protocol)
      if column in figures:
        matches.append(Match(i, row, column, figures[column]))
  return matches


def describe_matches(
  outcomes: Sequence[Outcome], matches: Sequence[Match]
) -> Iterator[Block]:
  """Figures beside results, their sources, and how the protocols differ."""
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
  outcomes: Sequence[Outcome], matches: Sequence[Match]
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


def format_figure(match: Match) -> str:
  """The figure with its unit, with the digits of its source."""
  unit = match.row.unit
  digits = f"{match.figure.value:.1f}" if unit == "%" else ""
  return f"{digits or f'{match.figure.value:.3f}'} {unit}".strip()


def _differences(
  outcomes: Sequence[Outcome], matches: Sequence[Match]
) -> Iterator[str]:
  """A line for each figure: source, protocol, what differs here."""
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
  outcomes: Sequence[Outcome], matches: Sequence[Match]
) -> Iterator[str]:
  """A line for each figure of an evaluation that is here on other data."""
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
