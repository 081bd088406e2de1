"""Sections of an evaluation report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mtv_jax.evals.report import published, references, tables
from mtv_jax.evals.report.report import Report
from mtv_jax.utils.pages import Block

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


def describe_report(
  report: Report, *, further: Sequence[Block] = ()
) -> Iterator[Block]:
  """Metrics, charts, encoders, what is missing, sheets and protocols.

  `further` follows the charts of the metrics.
  """
  yield Block("heading", "Metrics")
  further_cells = _published_cells(report) if report.published else None
  table = tables.metrics_table(report.columns, report.rows, further_cells)
  yield Block("table", table, {"numbers": 2})
  yield Block("note", _NOTE)
  if lines := _other_protocols(report):
    yield Block("note", _PROTOCOLS_NOTE)
    yield Block("bullets", lines)
  if report.left_out:
    names = ", ".join(report.left_out)
    yield Block("note", f"Not shown, for lack of the same data: {names}.")
  yield Block("note", _CHARTS_NOTE)
  yield Block("charts", report.charts)
  if report.quoted:
    yield Block("note", _PUBLISHED_NOTE)
    yield Block("table", _published_table(report))
  yield from further
  yield from published.describe_matches(report.columns, report.rows)
  yield Block("heading", "Encoders")
  yield Block("table", tables.encoder_table(report.columns))
  for title, lines in _missing(report):
    yield Block("heading", title)
    yield Block("bullets", lines)
  for name in tables.evaluation_names(report.columns):
    yield Block("heading", name)
    sheets = [s for s in report.sheets if s.evaluation == name]
    for sheet in dict.fromkeys(s.name for s in sheets):
      images = [s.file for s in sheets if s.name == sheet]
      yield Block("images", images)
    protocol = tables.compare_protocols(report.columns, name)
    inner = tuple(Block("table", table) for table in protocol.tables())
    yield Block("details", "Protocol", inner=inner)


def _published_cells(report: Report) -> list[str]:
  """The cells of the table's last column: a header, then one per row."""
  cells = ["published"]
  for row in report.rows:
    matches = [m for m in report.published if m.row == row]
    cells.append(
      "\n".join(
        f"{report.columns[m.encoder].name}: {published.format_figure(m)}"
        for m in matches
      )
    )
  return cells


def _other_protocols(report: Report) -> list[str]:
  """A line for each difference for which results have rows of their own."""
  names = dict.fromkeys(row.evaluation for row in report.rows if row.variant)
  return [
    line
    for name in names
    for line in tables.describe_differences(report.columns, name)
  ]


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
      suffix = f" ({', '.join(names)})" if len(report.outcomes) > 1 else ""
      lines.append(f"{name}{suffix}: {reason}")
    if lines:
      yield field.capitalize(), lines
