"""Values with intervals, a row each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mtv_jax.utils.charts.base import (
  TEXT,
  TITLE,
  WIDTH,
  Chart,
  Number,
  Scale,
  draw_text,
  draw_x_axis,
  escape_line,
  make_chart,
  make_scale,
)
from mtv_jax.utils.html import COLOURS
from mtv_jax.utils.plots import shorten, text_width

_ROW = 24  # Height of a row.


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
  left = 10 + max([text_width(label, TEXT) for label in labels], default=0)
  texts = [_value_text(row.value) for row in rows]
  right = 10 + max([text_width(text, TEXT) for text in texts], default=0)
  known = [row.value for row in rows] + [row.chance for row in rows]
  known += [v for r in rows for v in (*_shown_interval(r, unit), *r.points)]
  known = [v for v in known if v is not None]
  top, bottom = TITLE, TITLE + _ROW * len(rows) + 4
  scale = make_scale(known, left + 4, WIDTH - right)
  parts = [*draw_x_axis(scale, top, bottom)]
  for i, row in enumerate(rows):
    middle = top + _ROW * (i + 0.5) + 2
    parts.append(
      f"<text x='{left - 4:.1f}' y='{middle + 4:.1f}' class='end'>"
      f"{escape_line(labels[i])}<title>{escape_line(row.name)}</title></text>"
    )
    parts += _draw_interval(row, scale, middle, unit)
    parts.append(draw_text(WIDTH - 2, middle + 4, texts[i], "tick end"))
  chances = [row.chance for row in rows if row.chance is not None]
  legend = " ".join(
    [unit, "· lower is better" * lower, "· dashed: chance" * bool(chances)]
  )
  legend = " ".join(legend.split()).lstrip("· ")
  space = max(WIDTH - 2 - text_width(legend, TEXT), 2)
  parts.append(draw_text(min(left, space), bottom + 31, legend, "tick"))
  return make_chart(title, name, WIDTH, bottom + 38, parts)


def _shown_interval(row: Row, unit: str) -> tuple[Number, ...]:
  """Low and high; () without an interval, or without a value."""
  if row.value is None or row.low is None or row.high is None:
    return ()
  if unit != "%":
    return row.low, row.high
  return max(row.low, min(0, row.value)), min(row.high, max(100, row.value))


def _value_text(value: Number | None) -> str:
  if value is None or not math.isfinite(value):
    return "–"
  if abs(value) >= 10:
    return f"{value:.1f}"
  return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _draw_interval(
  row: Row, scale: Scale, y: Number, unit: str
) -> Iterator[str]:
  if row.chance is not None:
    x = scale(row.chance)
    half = _ROW / 2
    yield (
      f"<path class='chance' d='M{x:.1f} {y - half}V{y + half}'>"
      f"<title>chance: {row.chance:.4g} {escape_line(unit)}</title></path>"
    )
  if row.value is None or not math.isfinite(row.value):
    return
  text = f"{row.name}: {row.value:.4g} {unit}"
  yield f"<g class='c{row.colour % COLOURS}'>"
  for point in row.points:
    yield f"<circle class='seed' cx='{scale(point):.1f}' cy='{y}' r='2.5'/>"
  if shown := _shown_interval(row, unit):
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
    f"<title>{escape_line(text)}</title></circle></g>"
  )
