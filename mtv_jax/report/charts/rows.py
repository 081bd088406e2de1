"""Values in rows and cells: intervals, heat maps, histograms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mtv_jax.report.charts.base import (
  TEXT,
  TITLE,
  WIDTH,
  Chart,
  Number,
  Scale,
  add_title,
  draw_text,
  draw_x_axis,
  escape_line,
  is_drawn,
  make_chart,
  make_scale,
)
from mtv_jax.report.style import COLOURS
from mtv_jax.utils.plots import shorten, text_width

_ROW = 24  # Height of a row.
_CELL = 44  # Width of a cell; its height is `_ROW`.
_BARS = (276, 84)  # Width and height of the bars of a histogram.


class Row(NamedTuple):
  """One value of `interval_plot` with its interval."""

  name: str
  value: Number | None
  low: Number | None = None
  high: Number | None = None
  points: Sequence[Number] = ()  # single measurements, such as seeds
  chance: Number | None = None
  colour: int = 0
  note: str = ""  # shown under the pointer
  hollow: bool = False  # not measured here


def interval_plot(
  title: str,
  rows: Sequence[Row],
  *,
  name: str,
  unit: str,
  lower: bool = False,
) -> Chart:
  """Values with intervals, a row each: a forest plot.

  The axis spans chance and every interval, in percent from 0 to 100 at most: of
  two seeds an interval may be wider than that. A dashed line is at chance, from
  row to row where rows have their own.
  """
  labels = [shorten(row.name, 120, TEXT) for row in rows]
  left = 10 + _widest(labels)
  texts = [_value_text(row.value) for row in rows]
  right = 10 + _widest(texts)
  known = [row.value for row in rows] + [row.chance for row in rows]
  known += [v for r in rows for v in (*_shown_interval(r, unit), *r.points)]
  top, bottom = TITLE, TITLE + _ROW * len(rows) + 4
  scale = make_scale([v for v in known if is_drawn(v)], left + 4, WIDTH - right)
  parts = [*draw_x_axis(scale, top, bottom)]
  for i, row in enumerate(rows):
    middle = top + _ROW * (i + 0.5) + 2
    parts.append(
      f"<text x='{left - 4:.1f}' y='{middle + 4:.1f}' class='end'>"
      f"{escape_line(labels[i])}{add_title(row.name)}</text>"
    )
    parts += _draw_interval(row, scale, middle, unit)
    parts.append(draw_text(WIDTH - 2, middle + 4, texts[i], "tick end"))
  has_chance = any(row.chance is not None for row in rows)
  legend = [unit, "lower is better" * lower, "dashed: chance" * has_chance]
  legend = " · ".join(filter(None, legend))
  space = max(WIDTH - 2 - text_width(legend, TEXT), 2)
  parts.append(draw_text(min(left, space), bottom + 31, legend, "tick"))
  return make_chart(title, name, WIDTH, bottom + 38, parts)


def _widest(texts: Sequence[str]) -> float:
  return max([text_width(text, TEXT) for text in texts], default=0)


def _shown_interval(row: Row, unit: str) -> tuple[Number, ...]:
  """Low and high; () without an interval, or without a value."""
  if row.value is None or row.low is None or row.high is None:
    return ()
  if unit != "%":
    return row.low, row.high
  return max(row.low, min(0, row.value)), min(row.high, max(100, row.value))


def _value_text(value: Number | None) -> str:
  if not is_drawn(value):
    return "–"
  if abs(value) >= 10:
    return f"{value:.1f}" if abs(value) < 1e6 else f"{value:.1e}"
  return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _draw_interval(
  row: Row, scale: Scale, y: Number, unit: str
) -> Iterator[str]:
  if is_drawn(row.chance):
    x, half = scale(row.chance), _ROW / 2
    yield (
      f"<path class='chance' d='M{x:.1f} {y - half}V{y + half}'>"
      f"{add_title(f'chance: {row.chance:.4g} {unit}')}</path>"
    )
  if not is_drawn(row.value):
    return
  text = f"{row.name}: {row.value:.4g} {unit}"
  yield f"<g class='c{row.colour % COLOURS}'>"
  for point in row.points:
    yield f"<circle class='seed' cx='{scale(point):.1f}' cy='{y}' r='2.5'/>"
  shown = _shown_interval(row, unit)
  if shown and all(map(is_drawn, shown)):
    low, high = map(scale, shown)
    text += f", {row.low:.4g} to {row.high:.4g}"
    yield (
      f"<path class='bar' d='M{low:.1f} {y}H{high:.1f}"
      f"M{low:.1f} {y - 4}V{y + 4}M{high:.1f} {y - 4}V{y + 4}'/>"
    )
  text += f". {row.note}" if row.note else ""
  hollow = " class='hollow'" if row.hollow else ""
  yield (
    f"<circle{hollow} cx='{scale(row.value):.1f}' cy='{y}' r='4.5'>"
    f"{add_title(text)}</circle></g>"
  )


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

  `limit` is the size at which the colour is full, by default the largest;
  `x_label` is what the columns are; numbers with `marks` are in bold, and None
  leaves a cell empty.
  """
  known = [abs(v) for row in values for v in row if is_drawn(v)]
  limit = limit or max(known, default=0) or 1.0
  labels = [shorten(row, 150, TEXT) for row in rows]
  left = 8 + _widest(labels)
  heads = [shorten(column, 110, TEXT) for column in columns]
  longest = _widest(heads)
  # Heads that are wider than their cell are slanted.
  slanted = longest > _CELL - 4
  head = longest * 0.64 + 14 if slanted else 18
  top = TITLE + head + (16 if x_label else 0)
  parts = []
  if x_label:
    parts.append(draw_text(left, TITLE + 12, x_label, "tick"))
  for k, column in enumerate(heads):
    x, y = left + _CELL * (k + 0.5), top - 6
    turn = f" transform='rotate(-40 {x:.1f} {y:.1f})'" if slanted else ""
    css = "" if slanted else " class='middle'"
    text = escape_line(column)
    parts.append(f"<text x='{x:.1f}' y='{y:.1f}'{css}{turn}>{text}</text>")
  for i, row in enumerate(values):
    y = top + _ROW * i
    parts.append(draw_text(left - 5, y + 16, labels[i], "end"))
    for k, value in enumerate(row):
      label = f"{rows[i]}, {columns[k]}"
      bold = marks is not None and marks[i][k]
      parts.append(_draw_cell(left + _CELL * k, y, value, limit, label, bold))
  width = left + _CELL * len(columns) + (longest * 0.77) * slanted
  width = max(width + 4, text_width(title, 13) + 8)
  return make_chart(title, name, width, top + _ROW * len(rows) + 4, parts)


def _draw_cell(
  x: Number, y: Number, value: Number | None, limit: Number, label: str, bold
) -> str:
  box = f"x='{x:.1f}' y='{y:.1f}' width='{_CELL - 1}' height='{_ROW - 1}'"
  if not is_drawn(value):
    return f"<rect class='empty' {box}>{add_title(f'{label}: no value')}</rect>"
  share = min(abs(value) / limit, 1.0)
  css = "negative" if value < 0 else "positive"
  weight = " bold" if bold else ""
  return (
    f"<rect class='{css}' {box} fill-opacity='{0.75 * share:.2f}'>"
    f"{add_title(f'{label}: {value:.4g}')}</rect>"
    f"<text class='middle cell{weight}' x='{x + _CELL / 2:.1f}' "
    f"y='{y + 16:.1f}'>{_cell_text(value, limit)}</text>"
  )


def _cell_text(value: Number, limit: Number) -> str:
  """Five characters at most, with as many digits as the largest value has."""
  digits = 2 if limit < 10 else 1 if limit < 100 else 0
  text = f"{value:.{digits}f}" if limit < 1e4 else f"{value:.0e}"
  return text.lstrip("-") if float(text) == 0 else text.replace("-", "\u2212")


def histogram(
  title: str,
  counts: Sequence[int],
  labels: Sequence[str],
  *,
  ends: tuple[str, str],
  name: str,
) -> Chart:
  """Bars of counts; a bar's label and count are under the pointer.

  `ends` are below the first and the last bar.
  """
  (width, height), largest = _BARS, max(counts)
  pitch, bottom = width / len(counts), TITLE + height
  parts = ["<g class='c0'>"]
  for i, (count, label) in enumerate(zip(counts, labels, strict=True)):
    share = count / sum(counts)
    x, size = i * pitch, height * count / largest
    text = f"{label}: {count:,} ({100 * share:.3g} %)"
    parts.append(
      f"<rect class='filled' x='{x:.1f}' y='{bottom - size:.1f}' "
      f"width='{max(pitch - 1, 1):.1f}' height='{size:.1f}'>"
      f"{add_title(text)}</rect>"
    )
  parts.append(f"</g><path class='axis' d='M0 {bottom}H{width}'/>")
  for x, text, css in (
    (0, ends[0], ""),
    (width / 2, f"largest bar: {largest:,}", "middle"),
    (width, ends[1], "end"),
  ):
    parts.append(draw_text(x, bottom + 14, text, f"tick {css}"))
  return make_chart(title, name, width + 2, bottom + 18, parts)
