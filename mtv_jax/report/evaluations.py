"""Reports of evaluated encoders: metrics, charts, differences, sheets."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mtv_jax.evals.core import results
from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.published import (
  COLUMNS,
  FIGURES,
  REFERENCES,
  TABLE_5,
  Figure,
  matching_column,
)
from mtv_jax.report import charts, page, summary, tables
from mtv_jax.report.charts import Chart, Row
from mtv_jax.report.tables import MetricRow
from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.text import file_name, format_metric

Z_95 = 1.96  # Half width of a 95 % interval, in standard errors.
_PUBLISHED_COLOUR = 7  # Grey.
_PROTOCOLS_NOTE = (
  "These results have different protocols, and rows of their own:"
)
_CHARTS_NOTE = (
  "Charts: axes span chance and the best known values; bars are 1.96 standard "
  "errors to both sides."
)
_PUBLISHED_NOTE = (
  "Hollow: Table 5 of arXiv 2601.13886. Its protocols are only partly "
  "published, so its figures are for orientation."
)
_DIFFERENCES_NOTE = (
  "Differences in the metric's unit with 95 % intervals over the items of the "
  "test set, for these encoders: the variation over training seeds is not "
  "included. A difference is better or worse if p, corrected for all "
  "comparisons of main metrics on this page (Holm 1979), is below 0.05; it is "
  "missing if an encoder lacks a result with the other one's protocol. "
)
_PAIRED = "All are paired: both encoders' metrics on the same resamples."
_UNPAIRED = (
  "Not paired, with wider intervals from both standard errors: {}. All other "
  "differences are between both metrics on the same resamples."
)
# Columns of `tables.contrast_table` to drop if there is one run per encoder.
_SEED_COLUMNS = ("covers", "seeds", "note")


def write_evaluation(
  folder: str | os.PathLike,
  outcomes: Sequence[Outcome],
  *,
  compared: Sequence[Outcome] = (),
  baseline: str | None = None,
  size: str | None = "base",
) -> list[pathlib.Path]:
  """Writes the report of an evaluation, or of a comparison with a baseline.

  Replaces `results.json`, the pages, `sheets/*.png` and `charts/*.svg`, and
  returns their paths. `compared` are earlier outcomes, shown if measured on the
  same data. `size` selects the published encoders to chart; None: none.
  """
  title, markdown = "Evaluation", "results.md"
  if baseline is not None:
    names = [outcome.name for outcome in outcomes]
    check_baseline(baseline, names)
    title, markdown = f"Comparison of {', '.join(names)}", "report.md"
  options = dict(compared=compared, baseline=baseline, size=size)
  blocks = describe_outcomes(outcomes, **options)
  path = pathlib.Path(folder) / "results.json"
  results.write(path, outcomes)
  pages = ("report.html", markdown)
  return [*page.write_pages(title, blocks, folder, names=pages), path]


def check_baseline(baseline: str, names: Sequence[str]) -> None:
  """Raises ConfigError if no encoder has the baseline's name."""
  if baseline not in names:
    raise ConfigError(
      f"--baseline={baseline}: no encoder has this name. "
      f"{did_you_mean(baseline, names)}"
    )


def describe_outcomes(
  outcomes: Sequence[Outcome],
  *,
  compared: Sequence[Outcome] = (),
  baseline: str | None = None,
  size: str | None = "base",
) -> Iterator[page.PageBlock]:
  """Yields report blocks of an evaluation or, with a baseline, a comparison."""
  is_split, columns, counts = baseline is not None, [], collections.Counter()
  for outcome in (*outcomes, *compared):  # Numbers duplicate names.
    counts[outcome.name] += 1
    count = counts[outcome.name]
    name = outcome.name if count == 1 else f"{outcome.name} ({count})"
    columns.append(dataclasses.replace(outcome, name=name))
  outcomes = columns[: len(outcomes)]
  index = [o.name for o in columns].index(baseline) if is_split else None
  rows = tables.compare(columns, split=is_split, baseline=index)
  missing = [
    outcome.name
    for i, outcome in enumerate(columns)
    if i >= len(outcomes) and all(row.values[i] is None for row in rows)
  ]
  if missing:
    columns = [o for o in columns if o.name not in missing]
    rows = tables.compare(columns, split=is_split, baseline=index)
  matches = find_matches(columns, rows)
  yield page.Heading("Encoders")
  facts = {column.name: _list_facts(column) for column in columns}
  yield page.Table(summary.merge_facts(facts))
  by_name = {column.name: column for column in columns}
  yield from summary.describe_headlines(rows, by_name)
  yield from summary.describe_sheets(_list_sheets(outcomes))
  yield page.Heading("Metrics")
  metric_charts, quoted = draw_charts(columns, rows, size=size)
  yield page.Charts(metric_charts)
  yield page.Note(_CHARTS_NOTE)
  if quoted:
    yield page.Note(_PUBLISHED_NOTE)
    yield _published_table(quoted)
  published = _list_published(columns, rows, matches)
  yield tables.fold_metrics(columns, rows, published)
  if missing:
    yield page.Note(
      f"Not shown, as they lack the same data: {', '.join(missing)}."
    )
  if is_split and len(outcomes) > 1:
    yield from _describe_differences(rows, baseline)
  yield from _describe_matches(columns, matches)
  yield from _describe_missing(outcomes)
  yield from _describe_protocols(columns, rows)


def _list_facts(outcome: Outcome) -> dict[str, str]:
  """Properties of an encoder."""
  facts = {"encoder": outcome.encoder, "weights": outcome.weights}
  facts |= {"mtv_jax": outcome.version} | outcome.protocol
  return {k: tables.format_entry(v) for k, v in facts.items() if v is not None}


def _published_table(quoted: Sequence[str]) -> page.Table:
  """Values of Table 5 in the columns of `COLUMNS`."""
  head = ["published"]
  for column in quoted:
    unit = "m" if column == "nyu" else "%"
    head.append(f"{COLUMNS[column].label}, {unit}")
  lines = [[r.name, *(f"{r.figures[n]:g}" for n in quoted)] for r in REFERENCES]
  return page.Table([head, *lines])


def _list_published(
  columns: Sequence[Outcome],
  rows: Sequence[MetricRow],
  matches: Sequence[FigureMatch],
) -> list[str]:
  """A column of the table of metrics, header first; empty without figures."""
  cells = ["published"]
  for row in rows:
    same_row = [match for match in matches if match.row == row]
    lines = [f"{columns[m.encoder].name}: {format_figure(m)}" for m in same_row]
    cells.append("\n".join(lines))
  return cells if matches else []


def _describe_protocols(
  columns: Sequence[Outcome], rows: Sequence[MetricRow]
) -> Iterator[page.PageBlock]:
  """Protocols of the evaluations; first what makes results incomparable."""
  yield page.Heading("Protocols")
  if variants := dict.fromkeys(row.evaluation for row in rows if row.variant):
    yield page.Note(_PROTOCOLS_NOTE)
    yield page.Bullets(
      [line for n in variants for line in tables.list_differing(columns, n)]
    )
  for name in tables.evaluation_names(columns):
    protocol_tables = tables.compare_protocols(columns, name).tables()
    types = [o.results[name].type for o in columns if name in o.results]
    title = summary.name_evaluation(name, types[0])
    yield page.Details(title, [page.Table(table) for table in protocol_tables])


def draw_charts(
  columns: Sequence[Outcome], rows: Sequence[MetricRow], *, size: str | None
) -> tuple[list[Chart], list[str]]:
  """Charts of the main metrics, and their columns of `COLUMNS`.

  Published values, for encoders of `size` on the same data, are hollow.
  """
  references = [r for r in REFERENCES if r.size == size]
  metric_charts, quoted = [], []
  for row in rows:
    with_value = [i for i, value in enumerate(row.values) if value is not None]
    if not with_value or not row.is_main:
      continue
    title, more = "", []
    protocol = columns[with_value[0]].results[row.evaluation].protocol
    column = matching_column(row.evaluation, row.metric, protocol)
    if column in TABLE_5 and references:
      quoted.append(column)
      title = COLUMNS[column].label
      title += f" (protocol {row.variant})" * bool(row.variant)
      options = dict(chance=row.chance, colour=_PUBLISHED_COLOUR, hollow=True)
      more = [Row(r.name, r.figures[column], **options) for r in references]
    # With several protocols, list only the encoders that used this one.
    indices = with_value if row.variant else range(len(columns))
    names = {i: columns[i].name for i in indices}
    metric_charts.append(draw_metric(row, names, title=title, more=more))
  return metric_charts, list(dict.fromkeys(quoted))


def draw_metric(
  row: MetricRow,
  names: dict[int, str],
  *,
  title: str = "",
  more: Sequence[Row] = (),
) -> Chart:
  """Chart of one metric: a row per item of `names` (by index), then `more`."""
  metric, rows = row.label.removesuffix(" ↓"), []
  for i, name in names.items():
    value, error, ends = row.values[i], row.errors[i], (None, None)
    if value is not None and error is not None:
      ends = (value - Z_95 * error, value + Z_95 * error)
    rows.append(Row(name, value, *ends, chance=row.chance, colour=i))
  return charts.interval_plot(
    title or summary.name_row(row),
    [*rows, *more],
    name=file_name("metric", row.evaluation, metric),
    unit=row.unit,
    lower=row.lower,
  )


def _describe_differences(
  rows: Sequence[MetricRow], baseline: str
) -> Iterator[page.PageBlock]:
  """Differences from the baseline, if any are known."""
  comparisons = [c for r in rows if r.is_main for c in r.differences]
  measured = [c for c in comparisons if c.difference is not None]
  if not measured:
    return
  yield page.Heading(f"Differences from {baseline}")
  yield page.Table(tables.differences_table(comparisons))
  names = [f"{c.arm}, {c.metric.name}" for c in measured if c.items == "errors"]
  pairing = _UNPAIRED.format("; ".join(names)) if names else _PAIRED
  yield page.Note(_DIFFERENCES_NOTE + pairing)
  yield tables.list_contrasts([(c.name, c) for c in measured], _SEED_COLUMNS)


def _describe_missing(outcomes: Sequence[Outcome]) -> Iterator[page.PageBlock]:
  """A line per evaluation that failed or was skipped."""
  for field in ("failed", "skipped"):
    encoders: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
      for key in getattr(outcome, field).items():
        encoders.setdefault(key, []).append(outcome.name)
    lines = []
    for (name, reason), names in encoders.items():
      suffix = f" ({', '.join(names)})" if len(outcomes) > 1 else ""
      lines.append(f"{name}{suffix}: {reason}")
    if lines:
      yield page.Heading(field.capitalize())
      yield page.Bullets(lines)


def _list_sheets(
  outcomes: Sequence[Outcome],
) -> Iterator[tuple[str, str, page.ImageFile]]:
  """Yields (readable name of the evaluation, name of the grid, image)."""
  for outcome in outcomes:
    for evaluation, result in outcome.results.items():
      for name, image in result.sheets.items():
        parts = [evaluation, name, outcome.name][: 2 + (len(outcomes) > 1)]
        path = f"sheets/{file_name(*parts)}.png"
        title = summary.name_evaluation(evaluation, result.type)
        yield title, name, page.ImageFile(outcome.name, image, path)


class FigureMatch(NamedTuple):
  """A result and the figure published for its checkpoint and data."""

  encoder: int  # index of the outcome
  row: MetricRow
  column: str  # key of `COLUMNS`
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


def _describe_matches(
  outcomes: Sequence[Outcome], matches: Sequence[FigureMatch]
) -> Iterator[page.PageBlock]:
  """Compares results with published figures; lists sources and protocols."""
  if not any(outcome.checkpoint for outcome in outcomes):
    return
  yield page.Heading("Published figures")
  lines = [
    f"{o.name} is compared with figures published for {o.checkpoint}."
    for o in outcomes
    if o.checkpoint
  ]
  table = [["metric", "encoder", "here", "published", "difference"]]
  for match in matches:
    unit, value = match.row.unit, match.row.values[match.encoder]
    row = [COLUMNS[match.column].label, outcomes[match.encoder].name]
    row.append(
      tables.format_value(value, unit, match.row.errors[match.encoder])
    )
    difference = format_metric(value - match.figure.value, unit)
    table.append([*row, format_figure(match), difference])
  if matches:
    yield page.Table(table, numbers=2)
  yield page.Bullets([*lines, *_list_sources(outcomes, matches)])
  if other_data := [*_list_other_data(outcomes, matches)]:
    yield page.Note("Published, but not on the data of this comparison:")
    yield page.Bullets(other_data)


def format_figure(match: FigureMatch) -> str:
  """A figure with its unit: one decimal for "%", else three."""
  unit = match.row.unit
  digits = f"{match.figure.value:.1f}" if unit == "%" else ""
  return f"{digits or f'{match.figure.value:.3f}'} {unit}".strip()


def _list_sources(
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
    note = f" Here {', '.join(differing)}." if differing else ""
    yield (
      f"{COLUMNS[match.column].label}, {outcome.name}: "
      f"{format_figure(match)} is from {figure.source}. "
      f"Its protocol: {figure.protocol}.{note}"
    )


def _list_other_data(
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
