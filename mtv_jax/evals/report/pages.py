"""A report as Markdown, and as a page that needs no other file."""

from __future__ import annotations

from collections.abc import Iterator

from mtv_jax.evals.report import references, tables
from mtv_jax.evals.report.report import Report
from mtv_jax.utils import html as html_pages
from mtv_jax.utils.html import escape

_QUOTED = (
  "Dashed: Table 5 of arXiv 2601.13886. Its protocols are published in part, "
  "so those figures are for orientation."
)
_CHANCE = "Chance is what random embeddings or guesses would give."
_NO_FIGURE = (
  "A dash is a figure that there is none of, or that is on other data than "
  "the first column's. ↓: less is better."
)


def markdown(report: Report) -> str:
  """The report as Markdown, its pictures as files beside it."""
  blocks = ["# Evaluation", "## Figures"]
  blocks += [tables.markdown(report.columns), f"{_CHANCE} {_NO_FIGURE}"]
  if report.left_out:
    blocks += [_left_out(report)]
  if report.chart is not None:
    blocks += ["![Radar chart](radar.png)"]
  else:
    blocks += [f"No radar chart: {report.no_chart}."]
  if report.quoted:
    blocks += [_QUOTED, tables.markdown_grid(_published(report))]
  blocks += ["## Encoders"]
  blocks += [tables.markdown_grid(tables.encoder_rows(report.columns))]
  for title, lines in _not_run(report):
    blocks += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
  for name in tables.evaluations(report.columns):
    blocks += [f"## {name}"]
    blocks += [tables.markdown_protocol(report.columns, name)]
    for sheet in report.sheets:
      if sheet.evaluation == name:
        blocks += [f"![{sheet.name}, {sheet.encoder}]({sheet.path})"]
  return "\n\n".join(blocks) + "\n"


def _left_out(report: Report) -> str:
  names = ", ".join(report.left_out)
  return f"Left out, as no figure is on the same data: {names}."


def _published(report: Report) -> list[list[str]]:
  """The rows of the published table, a header first."""
  rows = [["published"]]
  rows += [[row.name] for row in references.REFERENCES]
  for name in report.quoted:
    column = references.COLUMNS[name]
    unit = "m" if name == "nyu" else "%"
    rows[0].append(f"{column.label}, {unit}")
    for row, reference in zip(rows[1:], references.REFERENCES, strict=True):
      row.append(f"{reference.figures[name]:g}")
  return rows


def _not_run(report: Report) -> Iterator[tuple[str, list[str]]]:
  """Titles, and a line for each evaluation that gave nothing."""
  for title, field in (("Failed", "failed"), ("Skipped", "skipped")):
    reasons: dict[tuple[str, str], list[str]] = {}
    for outcome in report.outcomes:
      for name, reason in getattr(outcome, field).items():
        reasons.setdefault((name, reason), []).append(outcome.name)
    lines = []
    for (name, reason), who in reasons.items():
      of = f" ({', '.join(who)})" if len(report.outcomes) > 1 else ""
      lines.append(f"{name}{of}: {reason}")
    if lines:
      yield title, lines


def html(report: Report) -> str:
  """The report as one page, its pictures within it."""
  body = ["<h1>Evaluation</h1>", _html_figures(report)]
  body += [f"<p class=note>{_CHANCE} {_NO_FIGURE}</p>"]
  if report.left_out:
    body += [f"<p class=note>{escape(_left_out(report))}</p>"]
  if report.chart is not None:
    body += [
      html_pages.image(report.chart, "Radar chart of the figures", css="chart")
    ]
  else:
    body += [f"<p class=note>No radar chart: {escape(report.no_chart)}.</p>"]
  if report.quoted:
    body += [
      f"<p class=note>{_QUOTED}</p>",
      html_pages.table(_published(report)),
    ]
  encoders = html_pages.table(tables.encoder_rows(report.columns))
  body += [f"<h2>Encoders</h2>{encoders}"]
  for title, lines in _not_run(report):
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    body += [f"<h2>{title}</h2><ul>{items}</ul>"]
  for name in tables.evaluations(report.columns):
    body += [f"<h2 id='{escape(name)}'>{escape(name)}</h2>"]
    body += list(_html_sheets(report, name))
    body += [_html_protocol(report, name)]
  return html_pages.page("Evaluation", body, style=_STYLE)


def _html_figures(report: Report) -> str:
  """The table of figures, a group of rows an evaluation."""
  names = [o.name for o in report.columns]
  header = ("evaluation", "metric", *names, "chance")
  lines = [f"<tr>{''.join(f'<th>{escape(c)}' for c in header)}</tr>"]
  before = None
  for row in tables.rows(report.columns):
    first = row.evaluation != before
    before = row.evaluation
    link = f"<a href='#{escape(before)}'>{escape(before)}</a>" if first else ""
    metric = escape(row.metric) + (" ↓" if row.lower else "")
    cells = [f"<td>{link}<td>{metric}"]
    for value in row.values:
      best = value is not None and value == row.best
      shown = escape(tables.with_unit(value, row.unit))
      cells.append(f"<td class=n>{f'<b>{shown}</b>' if best else shown}")
    chance = ""
    if row.chance is not None:
      chance = escape(tables.with_unit(row.chance, row.unit))
    cells.append(f"<td class='n note'>{chance}")
    group = " class=first" if first else ""
    lines.append(f"<tr{group}>{''.join(cells)}</tr>")
  rows = "".join(lines)
  return f"<div class=wide><table class=figures>{rows}</table></div>"


def _html_sheets(report: Report, name: str) -> Iterator[str]:
  """The sheets of an evaluation: a line a picture, the encoders in it."""
  sheets = [s for s in report.sheets if s.evaluation == name]
  for picture in dict.fromkeys(s.name for s in sheets):
    figures = []
    for sheet in (s for s in sheets if s.name == picture):
      title = f"{sheet.name}, {sheet.encoder}"
      image = html_pages.image(sheet.picture, title)
      figures.append(
        f"<figure>{image}<figcaption>{escape(title)}</figcaption></figure>"
      )
    several = " several" if len(figures) > 1 else ""
    yield f"<div class='sheets{several}'>{''.join(figures)}</div>"


def _html_protocol(report: Report, name: str) -> str:
  shown = tables.protocol(report.columns, name)
  rows = [[key, tables.short(value)] for key, value in shown.common.items()]
  parts = [html_pages.table([["protocol", ""], *rows])]
  if shown.own:
    rows = [[k, *map(tables.short, values)] for k, values in shown.own.items()]
    parts.append(html_pages.table([["differs", *shown.names], *rows]))
  return f"<details><summary>Protocol</summary>{''.join(parts)}</details>"


_STYLE = """tr.first td { border-top: 1px solid #ccc; }
.figures td, .figures th { white-space: nowrap; }
.figures th + th + th { text-align: right; padding-left: .5em; }
.sheets { display: flex; flex-wrap: wrap; gap: 1.2em; align-items: start; }
.several figure { max-width: calc(50% - .6em); }
"""
