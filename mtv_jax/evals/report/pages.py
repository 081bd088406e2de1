"""Renders a report as Markdown and as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from mtv_jax.evals.report import references, tables
from mtv_jax.evals.report.report import Report
from mtv_jax.utils import html, markdown

_NOTE = (
  "Chance is what random embeddings or guesses would give. A dash is a missing "
  "value, or one on other data than the first column's. ↓: lower is better. "
  f"±: standard error over the items of the set. Bold: {tables.BEST_NOTE}."
)
_CHARTS_NOTE = (
  "Charts: axes span chance and the best known values; bars are 1.96 standard "
  "errors to both sides."
)
_PUBLISHED_NOTE = (
  "Hollow: Table 5 of arXiv 2601.13886. Its protocols are published in part, "
  "so those figures are for orientation."
)


def render_markdown(report: Report) -> str:
  """The report as Markdown, with links to the files of its images."""
  return "\n\n".join(_render(report, markdown)) + "\n"


def render_html(report: Report) -> str:
  """The report as one page with inline images."""
  return html.page("Evaluation", [*_render(report, html)])


def _render(report: Report, writer: ModuleType) -> Iterator[str]:
  """Parts of the report, written by `utils.html` or `utils.markdown`."""
  yield writer.heading("Evaluation", level=1)
  yield writer.heading("Metrics")
  yield writer.table(tables.metrics_table(report.columns), numbers=2)
  yield writer.note(_NOTE)
  if report.left_out:
    names = ", ".join(report.left_out)
    yield writer.note(f"Not shown, for lack of the same data: {names}.")
  yield writer.note(_CHARTS_NOTE)
  yield writer.charts(report.charts)
  if report.quoted:
    yield writer.note(_PUBLISHED_NOTE)
    yield writer.table(_published_table(report))
  yield writer.heading("Encoders")
  yield writer.table(tables.encoder_table(report.columns))
  for title, lines in _missing(report):
    yield writer.heading(title)
    yield writer.bullets(lines)
  for name in tables.evaluation_names(report.columns):
    yield writer.heading(name)
    sheets = [s for s in report.sheets if s.evaluation == name]
    for sheet in dict.fromkeys(s.name for s in sheets):
      yield writer.images([s for s in sheets if s.name == sheet])
    protocol = tables.compare_protocols(report.columns, name)
    yield writer.details("Protocol", [*map(writer.table, protocol.tables())])


def _published_table(report: Report) -> list[list[str]]:
  """Published figures on the same data: a header, then one row per encoder."""
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
