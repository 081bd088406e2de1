"""Content of an evaluation report: columns, charts, sheets."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.report import published, references, tables
from mtv_jax.evals.report.tables import MetricRow
from mtv_jax.utils import charts
from mtv_jax.utils.charts import Chart, Row
from mtv_jax.utils.pages import ImageFile

# Metrics with a chart; of other evaluations the first one.
_HEADLINES = {
  "geometric_correspondence": ("avg_recall",),
  "retrieval": ("text_to_image_r1", "image_to_text_r1"),
  **dict.fromkeys(tables.DESCRIPTIVE, ()),
}
Z_95 = 1.96  # Standard errors to both sides of a value: its 95 % interval.
_PUBLISHED_COLOUR = 7  # Grey.


class Sheet(NamedTuple):
  """An image of an encoder's evaluation."""

  evaluation: str
  name: str
  file: ImageFile


class Report(NamedTuple):
  """Content of a report in any format."""

  outcomes: Sequence[Outcome]  # one per evaluated encoder
  columns: Sequence[Outcome]  # those, and earlier ones to compare with
  left_out: Sequence[str]  # names of earlier ones without the same data
  charts: Sequence[Chart]  # one for each main metric
  sheets: Sequence[Sheet]  # all encoders' sheets
  quoted: Sequence[str]  # columns of `references.COLUMNS` with the same data
  rows: Sequence[MetricRow]  # with a value for each column
  published: Sequence[published.Match]


def build_report(
  outcomes: Sequence[Outcome],
  *,
  compared: Sequence[Outcome] = (),
  size: str | None = "base",
  split: bool = False,
) -> Report:
  """Collects the content of a report.

  Args:
    outcomes: one per evaluated encoder.
    compared: earlier outcomes, shown where the data are the same.
    size: model size of the charted published encoders; None for none.
    split: see `tables.compare`.
  """
  columns = _number_equal_names([*outcomes, *compared])
  rows = tables.compare(columns, split=split)
  shown, left_out = columns[: len(outcomes)], []
  for i, outcome in enumerate(columns[len(outcomes) :], len(outcomes)):
    if any(row.values[i] is not None for row in rows):
      shown.append(outcome)
    else:
      left_out.append(outcome.name)
  if left_out:
    rows = tables.compare(shown, split=split)
  drawn, quoted = draw_charts(shown, rows, size=size)
  return Report(
    outcomes=shown[: len(outcomes)],
    columns=shown,
    left_out=left_out,
    charts=drawn,
    sheets=_list_sheets(shown[: len(outcomes)]),
    quoted=quoted,
    rows=rows,
    published=published.find_matches(shown, rows),
  )


def _number_equal_names(outcomes: Sequence[Outcome]) -> list[Outcome]:
  counts, renamed = collections.Counter(), []
  for outcome in outcomes:
    counts[outcome.name] += 1
    count = counts[outcome.name]
    name = outcome.name if count == 1 else f"{outcome.name} ({count})"
    renamed.append(dataclasses.replace(outcome, name=name))
  return renamed


def draw_charts(
  columns: Sequence[Outcome], rows: Sequence[MetricRow], *, size: str | None
) -> tuple[list[Chart], list[str]]:
  """Charts of the main metrics, from chance to the best known value.

  Bars are 1.96 standard errors to both sides. Published values of encoders of
  a size are hollow, where the data are the same.

  Args:
    columns: one per encoder.
    rows: of the columns, by `tables.compare`.
    size: model size of the published encoders; None for none.

  Returns:
    The charts, and the columns of `references.COLUMNS` among them.
  """
  others = [r for r in references.REFERENCES if r.size == size]
  drawn, quoted = [], []
  for row in rows:
    known = [i for i, value in enumerate(row.values) if value is not None]
    if not known:
      continue
    result = columns[known[0]].results[row.evaluation]
    if not is_main(row.evaluation, row.metric, [*result.metrics]):
      continue
    title, more = "", []
    column = references.matching_column(
      row.evaluation, row.metric, result.protocol
    )
    if column in references.TABLE_5 and others:
      quoted.append(column)
      title = references.COLUMNS[column].label
      title += f" (protocol {row.variant})" * bool(row.variant)
      more = [
        Row(
          r.name,
          r.figures[column],
          chance=row.chance,
          colour=_PUBLISHED_COLOUR,
          hollow=True,
        )
        for r in others
      ]
    names = [outcome.name for outcome in columns]
    if row.variant:  # The others have rows of their own.
      names = [name if i in known else None for i, name in enumerate(names)]
    drawn.append(draw_metric(row, names, title=title, more=more))
  return drawn, list(dict.fromkeys(quoted))


def draw_metric(
  row: MetricRow,
  names: Sequence[str | None],
  *,
  title: str = "",
  more: Sequence[Row] = (),
) -> Chart:
  """A chart of one metric with a row for each of `names`, then `more` rows.

  A name of None has no row.
  """
  rows = [
    interval_row(row, i, name, i)
    for i, name in enumerate(names)
    if name is not None
  ]
  metric = row.label.removesuffix(" ↓")
  return charts.interval_plot(
    title or f"{row.evaluation} {metric}",
    [*rows, *more],
    name=file_name("metric", row.evaluation, metric),
    unit=row.unit,
    lower=row.lower,
  )


def is_main(evaluation: str, metric: str, metrics: Sequence[str]) -> bool:
  """Whether a metric, among those of its evaluation, is a main one."""
  return metric in _HEADLINES.get(evaluation, tuple(metrics)[:1])


def interval_row(row: MetricRow, i: int, name: str, colour: int) -> Row:
  """The i-th value of a row with chance and 1.96 standard errors."""
  value, error = row.values[i], row.errors[i]
  known = value is not None and error is not None
  return Row(
    name,
    value,
    value - Z_95 * error if known else None,
    value + Z_95 * error if known else None,
    chance=row.chance,
    colour=colour,
  )


def file_name(*parts: str) -> str:
  """A file's name of letters, digits, dots and hyphens."""
  parts = [re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in parts]
  return "_".join(part or "unnamed" for part in parts)


def _list_sheets(outcomes: Sequence[Outcome]) -> list[Sheet]:
  sheets = []
  for evaluation in tables.evaluation_names(outcomes):
    for outcome in outcomes:
      result = outcome.results.get(evaluation)
      for name, image in (result.sheets if result else {}).items():
        parts = [evaluation, name, outcome.name][: 2 + (len(outcomes) > 1)]
        path = f"sheets/{file_name(*parts)}.png"
        file = ImageFile(f"{name}, {outcome.name}", image, path)
        sheets.append(Sheet(evaluation, name, file))
  return sheets
