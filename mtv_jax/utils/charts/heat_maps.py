"""Tables of numbers, coloured by sign and size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mtv_jax.utils.charts.base import (
  TEXT,
  TITLE,
  Chart,
  Number,
  draw_text,
  escape_line,
  make_chart,
)
from mtv_jax.utils.plots import shorten, text_width

_CELL_WIDTH, _CELL_HEIGHT = 44, 24


def heat_map(
  title: str,
  values: Sequence[Sequence[Number | None]],
  *,
  rows: Sequence[str],
  columns: Sequence[str],
  name: str,
  limit: Number | None = None,
  x_label: str = "",
  marks: Sequence[Sequence[bool]] | None = None,
) -> Chart:
  """A table of numbers, coloured by sign and size.

  Args:
    title: above the chart.
    values: one list a row; None leaves a cell empty.
    rows: names of the rows.
    columns: names of the columns.
    name: of the chart's file.
    limit: the size at which the colour is full; default: the largest.
    x_label: what the columns are.
    marks: cells whose number is in bold.
  """
  known = [abs(v) for row in values for v in row if v is not None]
  limit = limit or max([v for v in known if math.isfinite(v)], default=0) or 1.0
  labels = [shorten(row, 150, TEXT) for row in rows]
  left = 8 + max([text_width(label, TEXT) for label in labels], default=0)
  heads = [shorten(column, 110, TEXT) for column in columns]
  longest = max([text_width(head, TEXT) for head in heads], default=0)
  # Heads that are wider than their cell are slanted.
  slanted = longest > _CELL_WIDTH - 4
  head = longest * 0.64 + 14 if slanted else 18
  top = TITLE + head + (16 if x_label else 0)
  parts = []
  if x_label:
    parts.append(draw_text(left, TITLE + 12, x_label, "tick"))
  for k, column in enumerate(heads):
    x = left + _CELL_WIDTH * (k + 0.5)
    turn = f" transform='rotate(-40 {x:.1f} {top - 6:.1f})'" if slanted else ""
    css = "" if slanted else " class='middle'"
    text = escape_line(column)
    parts.append(
      f"<text x='{x:.1f}' y='{top - 6:.1f}'{css}{turn}>{text}</text>"
    )
  for i, row in enumerate(values):
    y = top + _CELL_HEIGHT * i
    parts.append(draw_text(left - 5, y + 16, labels[i], "end"))
    for k, value in enumerate(row):
      x = left + _CELL_WIDTH * k
      label = f"{rows[i]}, {columns[k]}"
      bold = marks is not None and marks[i][k]
      parts.append(_draw_cell(x, y, value, limit, label, bold=bold))
  width = left + _CELL_WIDTH * len(columns) + (longest * 0.77) * slanted
  width = max(width + 4, text_width(title, 13) + 8)
  return make_chart(
    title, name, width, top + _CELL_HEIGHT * len(rows) + 4, parts
  )


def _draw_cell(
  x: Number, y: Number, value: Number | None, limit: Number, label: str, *, bold
) -> str:
  box = f"x='{x:.1f}' y='{y:.1f}' width='{_CELL_WIDTH - 1}'"
  box += f" height='{_CELL_HEIGHT - 1}'"
  if value is None or not math.isfinite(value):
    title = f"<title>{escape_line(label)}: no value</title>"
    return f"<rect class='empty' {box}>{title}</rect>"
  share = min(abs(value) / limit, 1.0)
  css = "negative" if value < 0 else "positive"
  text = _cell_text(value, limit)
  weight = " bold" if bold else ""
  return (
    f"<rect class='{css}' {box} fill-opacity='{0.75 * share:.2f}'>"
    f"<title>{escape_line(label)}: {value:.4g}</title></rect>"
    f"<text class='middle cell{weight}' x='{x + _CELL_WIDTH / 2:.1f}' "
    f"y='{y + 16:.1f}'>{text}</text>"
  )


def _cell_text(value: Number, limit: Number) -> str:
  """Five characters at most, with as many digits as the largest value has."""
  digits = 2 if limit < 10 else 1 if limit < 100 else 0
  text = f"{value:.{digits}f}" if limit < 1e4 else f"{value:.0e}"
  return text.lstrip("-") if float(text) == 0 else text.replace("-", "\u2212")
