"""Reports of evaluated encoders: metrics, charts, differences, sheets."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

from mtv_jax.evals.core import results
from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.published import (
  COLUMNS,
  REFERENCES,
  TABLE_5,
  matching_column,
)
from mtv_jax.report import charts, differences, page, published, tables
from mtv_jax.report.charts import Chart, Row
from mtv_jax.report.tables import MetricRow
from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.text import file_name

Z_95 = 1.96  # Half width of a 95 % interval, in standard errors.
_PUBLISHED_COLOUR = 7  # Grey.
_NOTE = (
  "Chance is what random embeddings or guesses would give. A dash is a missing "
  "value, or one on other data than the first column's. ↓: lower is better. "
  f"±: standard error over the items of the set. Bold: {tables.BEST_NOTE}."
)
_PROTOCOLS_NOTE = (
  "These results have different protocols, and rows of their own:"
)
_CHARTS_NOTE = (
  "Charts: axes span chance and the best known values; bars are 1.96 standard "
  "errors to both sides."
)
_PUBLISHED_NOTE = (
  "Hollow: Table 5 of arXiv 2601.13886. Its protocols are published in part, "
  "so those figures are for orientation."
)
_DIFFERENCES_NOTE = (
  "Differences in the metric's unit with 95 % intervals over the items of the "
  "test set, for these encoders: the variation over seeds of a training is not "
  "included. A difference is better or worse if the interval excludes 0 and p, "
  "corrected for all comparisons of main metrics on this page (Holm 1979), is "
  "below 0.05; it is missing if an encoder lacks a result by the other one's "
  "protocol. "
)
_PAIRED = "All are paired: both encoders' metrics on the same resamples."
_UNPAIRED = (
  "Not paired, from the standard errors of both, which is wider: {}. All other "
  "differences are between both metrics on the same resamples."
)
# Columns of `differences.contrast_table` without the intervals over seeds.
_CONTRAST = (
  "comparison",
  "metric",
  "difference",
  "items 95 %",
  "p",
  "p Holm",
  "verdict",
)


def write_evaluation(
  folder: str | os.PathLike,
  outcomes: Sequence[Outcome],
  *,
  compared: Sequence[Outcome] = (),
  size: str | None = "base",
) -> list[pathlib.Path]:
  """Writes the report of an evaluation; returns the paths.

  Replaces `results.json`, `results.md`, `report.html`, `sheets/*.png` and
  `charts/*.svg`. `compared` are earlier outcomes, shown if on equal data.
  `size` is the model size of the charted published encoders, None for none.
  """
  blocks = describe_outcomes(outcomes, compared=compared, size=size)
  path = pathlib.Path(folder) / "results.json"
  results.write(path, outcomes)
  names = ("report.html", "results.md")
  return [*page.write_pages("Evaluation", blocks, folder, names=names), path]


def write_comparison(
  outcomes: Sequence[Outcome],
  output: str | os.PathLike,
  *,
  baseline: str,
  size: str | None = "base",
) -> list[pathlib.Path]:
  """Writes a comparison of encoders; returns the paths.

  The tables have a row per protocol, and differences from the baseline encoder,
  paired by item if the results have resamples. `size` is the model size of the
  charted published encoders, None for none.
  """
  names = [outcome.name for outcome in outcomes]
  check_baseline(baseline, names)
  blocks = describe_outcomes(outcomes, baseline=baseline, size=size)
  path = pathlib.Path(output) / "results.json"
  results.write(path, outcomes)
  title = f"Comparison of {', '.join(names)}"
  return [*page.write_pages(title, blocks, output), path]


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
  """Metrics, charts, encoders, missing results, sheets and protocols.

  With a baseline, each protocol has its own row, and differences from the
  baseline are shown.
  """
  split = baseline is not None
  columns = _number_equal_names([*outcomes, *compared])
  outcomes = columns[: len(outcomes)]
  index = [o.name for o in columns].index(baseline) if split else None
  rows = tables.compare(columns, split=split, baseline=index)
  left_out = [
    i
    for i in range(len(outcomes), len(columns))
    if all(row.values[i] is None for row in rows)
  ]
  missing = [columns[i].name for i in left_out]
  if left_out:
    columns = [o for i, o in enumerate(columns) if i not in left_out]
    rows = tables.compare(columns, split=split, baseline=index)
  matches = published.find_matches(columns, rows)
  yield page.Heading("Metrics")
  cells = _published_cells(columns, rows, matches) if matches else None
  yield page.Table(tables.metrics_table(columns, rows, cells), numbers=2)
  yield page.Note(_NOTE)
  variants = dict.fromkeys(row.evaluation for row in rows if row.variant)
  if variants:
    yield page.Note(_PROTOCOLS_NOTE)
    yield page.Bullets(
      [line for n in variants for line in tables.list_differing(columns, n)]
    )
  if missing:
    yield page.Note(
      f"Not shown, for lack of the same data: {', '.join(missing)}."
    )
  yield page.Note(_CHARTS_NOTE)
  drawn, quoted = draw_charts(columns, rows, size=size)
  yield page.Charts(drawn)
  if quoted:
    yield page.Note(_PUBLISHED_NOTE)
    yield page.Table(_published_table(quoted))
  if split and len(outcomes) > 1:
    yield from _describe_differences(rows, baseline)
  yield from published.describe_matches(columns, matches)
  yield page.Heading("Encoders")
  yield page.Table(tables.encoder_table(columns))
  yield from _describe_missing(outcomes)
  for name in tables.evaluation_names(columns):
    yield page.Heading(name)
    yield from _list_sheets(outcomes, name)
    protocol = tables.compare_protocols(columns, name)
    yield page.Details(
      "Protocol", [page.Table(table) for table in protocol.tables()]
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

  Published values, of encoders of `size` on equal data, are hollow. Returns the
  charts, and their columns of `published.COLUMNS`.
  """
  references = [r for r in REFERENCES if r.size == size]
  drawn, quoted = [], []
  for row in rows:
    known = [i for i, value in enumerate(row.values) if value is not None]
    if not known or not row.is_main:
      continue
    title, more = "", []
    protocol = columns[known[0]].results[row.evaluation].protocol
    column = matching_column(row.evaluation, row.metric, protocol)
    if column in TABLE_5 and references:
      quoted.append(column)
      title = COLUMNS[column].label
      title += f" (protocol {row.variant})" * bool(row.variant)
      options = dict(chance=row.chance, colour=_PUBLISHED_COLOUR, hollow=True)
      more = [Row(r.name, r.figures[column], **options) for r in references]
    # With several protocols, list only the encoders that used this one.
    names = {
      i: column.name
      for i, column in enumerate(columns)
      if i in known or not row.variant
    }
    drawn.append(draw_metric(row, names, title=title, more=more))
  return drawn, list(dict.fromkeys(quoted))


def draw_metric(
  row: MetricRow,
  names: dict[int, str],
  *,
  title: str = "",
  more: Sequence[Row] = (),
) -> Chart:
  """Chart of one metric: a row per item of `names` (by index), then `more`."""
  metric = row.label.removesuffix(" ↓")
  return charts.interval_plot(
    title or f"{row.evaluation} {metric}",
    [*(interval_row(row, i, name, i) for i, name in names.items()), *more],
    name=file_name("metric", row.evaluation, metric),
    unit=row.unit,
    lower=row.lower,
  )


def interval_row(row: MetricRow, i: int, name: str, colour: int) -> Row:
  """The i-th value of a row, with chance and its 95 % interval."""
  value, error = row.values[i], row.errors[i]
  ends = (None, None)
  if value is not None and error is not None:
    ends = (value - Z_95 * error, value + Z_95 * error)
  return Row(name, value, *ends, chance=row.chance, colour=colour)


def _published_cells(
  columns: Sequence[Outcome],
  rows: Sequence[MetricRow],
  matches: Sequence[published.FigureMatch],
) -> list[str]:
  """The column of published figures: a header, then a cell per row."""
  cells = ["published"]
  for row in rows:
    lines = [
      f"{columns[m.encoder].name}: {published.format_figure(m)}"
      for m in matches
      if m.row == row
    ]
    cells.append("\n".join(lines))
  return cells


def _published_table(quoted: Sequence[str]) -> list[list[str]]:
  """Published figures on equal data: a header, then a row per encoder."""
  units = ["m" if name == "nyu" else "%" for name in quoted]
  head = [
    f"{COLUMNS[n].label}, {unit}" for n, unit in zip(quoted, units, strict=True)
  ]
  rows = [[r.name, *(f"{r.figures[n]:g}" for n in quoted)] for r in REFERENCES]
  return [["published", *head], *rows]


def _describe_differences(
  rows: Sequence[MetricRow], baseline: str
) -> Iterator[page.PageBlock]:
  """Differences from the baseline, if any are known."""
  compared = [c for r in rows if r.is_main for c in r.differences]
  known = [c for c in compared if c.difference is not None]
  if not known:
    return
  yield page.Heading(f"Differences from {baseline}")
  yield page.Table(differences.differences_table(compared))
  names = [f"{c.arm}, {c.metric.name}" for c in known if c.items == "errors"]
  how = _UNPAIRED.format("; ".join(names)) if names else _PAIRED
  yield page.Note(_DIFFERENCES_NOTE + how)
  yield differences.list_contrasts([(c.name, c) for c in known], _CONTRAST)


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
  outcomes: Sequence[Outcome], evaluation: str
) -> Iterator[page.Images]:
  """The sheets of an evaluation; sheets with equal names are side by side."""
  sheets: dict[str, list[page.ImageFile]] = {}
  for outcome in outcomes:
    result = outcome.results.get(evaluation)
    for name, image in (result.sheets if result else {}).items():
      parts = [evaluation, name, outcome.name][: 2 + (len(outcomes) > 1)]
      path = f"sheets/{file_name(*parts)}.png"
      file = page.ImageFile(f"{name}, {outcome.name}", image, path)
      sheets.setdefault(name, []).append(file)
  for files in sheets.values():
    yield page.Images(files)
