"""Renders a report as Markdown and as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator

from mtv_jax.evals.report import references, tables
from mtv_jax.evals.report.report import Report
from mtv_jax.utils import html as html_lib
from mtv_jax.utils.html import escape

_NOTE = (
  "Chance is what random embeddings or guesses would give. A dash is a missing "
  "value, or one on other data than the first column's. ↓: lower is better."
)
_PUBLISHED_NOTE = (
  "Dashed: Table 5 of arXiv 2601.13886. Its protocols are published in part, "
  "so those figures are for orientation."
)


def render_markdown(report: Report) -> str:
  """The report as Markdown, with links to the files of its images."""
  blocks = ["# Evaluation", "## Metrics"]
  blocks += [tables.markdown_metrics(report.columns), *_notes(report)]
  if report.chart is not None:
    blocks += ["![Radar chart](radar.png)"]
  if report.quoted:
    table = tables.markdown_table(_published_table(report))
    blocks += [_PUBLISHED_NOTE, table]
  encoders = tables.markdown_table(tables.encoder_table(report.columns))
  blocks += ["## Encoders", encoders]
  for title, lines in _missing(report):
    blocks += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
  for name in tables.evaluation_names(report.columns):
    blocks += [f"## {name}"]
    protocol = tables.compare_protocols(report.columns, name)
    blocks += map(tables.markdown_table, protocol.tables())
    blocks += [
      f"![{sheet.title}]({sheet.path})"
      for sheet in report.sheets
      if sheet.evaluation == name
    ]
  return "\n\n".join(blocks) + "\n"


def render_html(report: Report) -> str:
  """The report as one page with inline images."""
  body = ["<h1>Evaluation</h1>", _html_metrics(report)]
  body += [f"<p class=note>{escape(note)}</p>" for note in _notes(report)]
  if report.chart is not None:
    body += [html_lib.image(report.chart, "Radar chart", css="chart")]
  if report.quoted:
    table = html_lib.table(_published_table(report))
    body += [f"<p class=note>{_PUBLISHED_NOTE}</p>", table]
  encoders = html_lib.table(tables.encoder_table(report.columns))
  body += ["<h2>Encoders</h2>", encoders]
  for title, lines in _missing(report):
    body += [f"<h2>{title}</h2>", html_lib.bullets(lines)]
  for name in tables.evaluation_names(report.columns):
    body += [f"<h2 id='{escape(name)}'>{escape(name)}</h2>"]
    body += _html_sheets(report, name)
    protocol = tables.compare_protocols(report.columns, name)
    inner = "".join(map(html_lib.table, protocol.tables()))
    body += [html_lib.details("Protocol", inner)]
  return html_lib.page("Evaluation", body, style=_STYLE)


def _notes(report: Report) -> Iterator[str]:
  yield _NOTE
  if report.left_out:
    yield f"Not shown, for lack of the same data: {', '.join(report.left_out)}."
  if report.chart is None:
    yield "No radar chart: it needs 3 metrics or more."


def _published_table(report: Report) -> list[list[str]]:
  """The published figures on the same data: a header, then an encoder a row."""
  rows = [["published"]]
  rows += [[row.name] for row in references.REFERENCES]
  for name in report.quoted:
    unit = "m" if name == "nyu" else "%"
    rows[0].append(f"{references.COLUMNS[name].label}, {unit}")
    for row, reference in zip(rows[1:], references.REFERENCES, strict=True):
      row.append(f"{reference.figures[name]:g}")
  return rows


def _missing(report: Report) -> Iterator[tuple[str, list[str]]]:
  """Titles, and a line for each evaluation without a result."""
  for field in ("failed", "skipped"):
    encoders: dict[tuple[str, str], list[str]] = {}
    for outcome in report.outcomes:
      for key in getattr(outcome, field).items():
        encoders.setdefault(key, []).append(outcome.name)
    lines = []
    for (name, reason), names in encoders.items():
      of = f" ({', '.join(names)})" if len(report.outcomes) > 1 else ""
      lines.append(f"{name}{of}: {reason}")
    if lines:
      yield field.capitalize(), lines


def _html_metrics(report: Report) -> str:
  """The table of metrics, whose evaluations link to their sections."""
  names = [outcome.name for outcome in report.columns]
  header = ("evaluation", "metric", *names, "chance")
  lines = [f"<tr>{''.join(f'<th>{escape(c)}' for c in header)}"]
  previous = None
  for row in tables.compare(report.columns):
    name, group = escape(row.evaluation), row.evaluation != previous
    previous = row.evaluation
    lines.append("<tr class=first>" if group else "<tr>")
    link = f"<a href='#{name}'>{name}</a>" if group else ""
    lines.append(f"<td>{link}<td>{escape(row.label)}")
    for text, best in row.cells:
      text = f"<b>{escape(text)}</b>" if best else escape(text)
      lines.append(f"<td class=n>{text}")
    lines.append(f"<td class='n note'>{escape(row.chance_text)}")
  return f"<div class=wide><table class=metrics>{''.join(lines)}</table></div>"


def _html_sheets(report: Report, evaluation: str) -> Iterator[str]:
  """The sheets of an evaluation, those of all encoders in one line."""
  sheets = [s for s in report.sheets if s.evaluation == evaluation]
  for name in dict.fromkeys(s.name for s in sheets):
    figures = [
      f"<figure>{html_lib.image(sheet.image, sheet.title)}"
      f"<figcaption>{escape(sheet.title)}</figcaption></figure>"
      for sheet in sheets
      if sheet.name == name
    ]
    several = " several" if len(figures) > 1 else ""
    yield f"<div class='sheets{several}'>{''.join(figures)}</div>"


_STYLE = """tr.first td { border-top: 1px solid #ccc; }
.metrics td, .metrics th { white-space: nowrap; }
.metrics th + th + th { text-align: right; padding-left: .5em; }
.sheets { display: flex; flex-wrap: wrap; gap: 1.2em; align-items: start; }
.several figure { max-width: calc(50% - .6em); }
"""
