"""Reports of evaluated encoders: metrics, charts, differences, sheets."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mtv_jax.config.options import is_plugin
from mtv_jax.evals.core import results
from mtv_jax.evals.core.base import evaluation_type, registered_class
from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.published import (
  COLUMNS,
  FIGURES,
  REFERENCES,
  TABLE_5,
  Figure,
  matching_column,
)
from mtv_jax.report import charts, page, tables
from mtv_jax.report.charts import Chart, Row
from mtv_jax.report.contrasts import (
  BETTER,
  NOT_DISTINGUISHABLE,
  WORSE,
  Contrast,
  correct_by_key,
)
from mtv_jax.report.tables import MetricRow
from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.text import file_name, format_metric, list_first

_VERDICTS_NOTE = (
  "One figure per evaluation. ±: standard error over the test set. Chance is "
  "what random embeddings or guesses would give. Better and worse concern "
  "these encoders on the population of the test items: p, corrected for the "
  "main metrics of the page (Holm 1979), is below 0.05. They say nothing "
  "about the training: another seed gives another encoder, and two runs that "
  "differ only in the seed are often distinguishable."
)
MAX_NAMES = 3  # Names in a sentence.
_MIN_ITEMS = 30  # Test sets with fewer items get a warning.
# What the image grids of evaluations show, by name.
_IMAGE_GRIDS = {
  "captions": "the best captions of an image; green: its own",
  "images": "the best images for a caption; green frame: its own",
  "regions": "boxes with their phrase, and with the best phrase of all",
  "depth": "true and predicted depth; red is near, blue far, black unknown",
  "segmentation": "true and predicted classes",
  "zero_shot_segmentation": "true and predicted classes",
  "video_segmentation": "true and predicted objects",
  "matches": "matched points; green: correct",
  "pca": "patches in the colours of three principal components",
}
_METRICS = {
  "abs_rel": "absolute relative error",
  "rmse": "root mean square error",
  "avg_recall": "average recall",
  "miou": "mean IoU",
}
# Protocol entries that state the size of a test set.
_SIZE_KEYS = ("images", "captions", "boxes", "pairs", "points", "videos")
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


def merge_facts(facts: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
  """The known facts of runs or encoders by name: a header, then a row per fact.

  If values differ, a cell has a line per name. Empty values are unknown.
  """
  rows = [["fact", "value"]]
  for key in dict.fromkeys(key for entry in facts.values() for key in entry):
    values = {name: entry.get(key, "") for name, entry in facts.items()}
    texts = {*values.values()}
    if len(texts) > 1:
      lines = (f"{n}: {v or tables.EMPTY}" for n, v in values.items())
      texts = ["\n".join(lines)]
    rows += [[key, text] for text in texts if text]
  return rows


def name_evaluation(name: str, recorded: str = "") -> str:
  """A readable name: `val_retrieval` is "Image-text retrieval (val)".

  `recorded` is the type of the evaluation, if its result records it.
  """
  kind = evaluation_type(name, recorded)
  if is_plugin(kind):  # The entry's name, which may be `MODULE:NAME`.
    words = name.rpartition(":")[2].replace("_", " ")
    return words[:1].upper() + words[1:]
  title = registered_class(name, recorded).title
  suffix = name.replace(kind, "").strip("_").replace("_", " ")
  title = title or kind.replace("_", " ").capitalize()
  return f"{title} ({suffix})" if suffix else title


def name_metric(name: str) -> str:
  """A readable name: `text_to_image_r1` is "text to image recall at 1"."""
  if name in _METRICS:
    return _METRICS[name]
  name = re.sub(r"(^|_)r(\d+)$", r"\1recall_at_\2", name)
  name = re.sub(r"^top(\d+)", r"top-\1_accuracy", name)
  name = re.sub(r"_k(\d+)$", r", k = \1", name)
  return name.replace("_", " ").replace("iou", "IoU")


def name_row(row: tables.MetricRow) -> str:
  """A readable name of an evaluation's metric and protocol."""
  protocol = f" (protocol {row.variant})" if row.variant else ""
  title = name_evaluation(row.evaluation, row.kind)
  return f"{title}: {name_metric(row.metric)}{protocol}"


def describe_sheets(
  sheets: Iterable[tuple[str, str, page.ImageFile]],
) -> Iterator[page.PageBlock]:
  """Image grids of one encoder or of several.

  `sheets` are (readable name of the evaluation, name of the grid, image); the
  image's title is the encoder's name.
  """
  groups = collections.defaultdict(list)
  for evaluation, name, file in sheets:
    groups[evaluation, name].append(file)
  if not groups:
    return
  yield page.Heading("Held-out images")
  named = []
  for (evaluation, sheet), files in groups.items():
    content = _IMAGE_GRIDS.get(sheet, sheet.replace("_", " "))
    named.append((f"{evaluation}: {content}", files))
  if len({file.title for _, files in named for file in files}) == 1:
    yield page.Images([file._replace(title=title) for title, (file,) in named])
    return
  for title, files in named:
    yield page.Heading(title, level=3)
    yield page.Images(files)


def describe_headlines(
  rows: Sequence[MetricRow],
  outcomes: Mapping[str, Outcome | None],
  changes: Mapping[str, Contrast] | None = None,
  *,
  note: str = _VERDICTS_NOTE,
) -> Iterator[page.PageBlock]:
  """One figure per evaluation with chance, differences and verdicts.

  `outcomes` are by the name of a column of `rows`, None if it has no results;
  `changes` are one run's last changes since its start, by metric.
  """
  yield page.Heading("Results")
  main_rows: dict[tuple[str, int], MetricRow] = {}
  for row in rows:
    if row.is_main and any(v is not None for v in row.values):
      main_rows.setdefault((row.evaluation, row.variant), row)
  if not main_rows:
    yield page.Note("No evaluation has a result yet.")
    return
  names = [f"{row.evaluation}/{row.metric}" for row in main_rows.values()]
  latest = correct_by_key({n: (changes or {}).get(n) for n in names})
  yield page.Headlines(
    [
      _describe_row(row, outcomes, latest.get(name))
      for name, row in zip(names, main_rows.values(), strict=True)
    ]
  )
  yield page.Note(note)


def _describe_row(
  row: MetricRow,
  outcomes: Mapping[str, Outcome | None],
  change: Contrast | None,
) -> page.Headline:
  names = [*outcomes]
  with_value = [i for i, value in enumerate(row.values) if value is not None]
  protocol = outcomes[names[with_value[0]]].results[row.evaluation].protocol
  figures = [
    tables.format_value(value, row.unit, error, digits=1)
    for value, error in zip(row.values, row.errors, strict=True)
  ]
  if len(names) > 1:
    figures = [page.Swatch(f"{names[i]}: {figures[i]}", i) for i in with_value]
  counts = {k: v for k in _SIZE_KEYS if isinstance(v := protocol.get(k), int)}
  details = [", ".join(f"{count:,} {k}" for k, count in counts.items())]
  if row.chance is not None:
    chance = tables.format_value(row.chance, row.unit, digits=1)
    details.append(f"chance {chance}")
  sentences = [*_compare_with_chance(row, names)]
  if change is not None:
    text = tables.format_difference(change, unit=True)
    sentences.append(f"Change since the start: {text}: {change.verdict}.")
  for c in row.differences:
    if c.difference is not None:
      text = tables.format_difference(c, unit=True)
      verdict = f": {c.verdict}" * (c.p_holm is not None)
      sentences.append(f"{c.name}: {text}{verdict}.")
  if row.best is not None and not row.differences:
    sentences.append(f"Best: {names[row.best]}.")
  if counts and min(counts.values()) < _MIN_ITEMS:
    sentences.append("The test set is too small for a reliable verdict.")
  title = name_evaluation(row.evaluation, row.kind)
  title += f" (protocol {row.variant})" if row.variant else ""
  metric = name_metric(row.metric) + ", lower is better" * row.lower
  return page.Headline(
    title, metric, figures, "; ".join(filter(None, details)), sentences
  )


def _compare_with_chance(row: MetricRow, names: Sequence[str]) -> Iterator[str]:
  """Yields a sentence per verdict against chance."""
  groups = collections.defaultdict(list)
  for name, c in zip(names, row.over_chance, strict=bool(row.over_chance)):
    if c is None:
      continue
    preposition = "from" if c.verdict == NOT_DISTINGUISHABLE else "than"
    text = f"{c.verdict} {preposition} chance"
    if c.p is None:  # The error is 0 or unknown.
      text = (
        f"{BETTER if c.gain > 0 else WORSE} than chance, without an interval"
      )
      text = text if c.gain else "equal to chance"
    groups[text.capitalize()].append(name)
  for text, members in groups.items():
    named = f": {list_first(members, MAX_NAMES)}" if len(names) > 1 else ""
    yield f"{text}{named}."


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
  yield page.Table(merge_facts(facts))
  by_name = {column.name: column for column in columns}
  yield from describe_headlines(rows, by_name)
  yield from describe_sheets(_list_sheets(outcomes))
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
    title = name_evaluation(name, types[0])
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
    title or name_row(row),
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
        title = name_evaluation(evaluation, result.type)
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
