"""Curves over steps or sizes."""

from __future__ import annotations

import math
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
  list_ticks,
  make_chart,
  make_scale,
)
from mtv_jax.report.style import COLOURS
from mtv_jax.utils.plots import shorten, text_width
from mtv_jax.utils.text import format_short

_GAP = 14  # Between the names of series.
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


class Series(NamedTuple):
  """One curve, or one set of points."""

  name: str
  points: Sequence[tuple[Number, Number | None]]  # (x, y); None: no value
  colour: int = 0
  # (x, low, high), drawn as an area, or as bars through dots.
  intervals: Sequence[tuple[Number, Number, Number]] = ()
  style: str = "line"  # or "dots", or "dashed", which has no label


def line_chart(
  title: str,
  series: Sequence[Series],
  *,
  name: str,
  x_label: str,
  log_x: bool = False,
  log_y: bool = False,
  chance: Number | None = None,
  height: int = 210,
) -> Chart:
  """Curves with their names at the right; a dashed line at `chance`."""
  labelled = [s for s in series if s.style != "dashed" and s.points]
  names = [shorten(s.name, 84, TEXT) for s in labelled]
  right = 14 + max([text_width(n, TEXT) for n in names], default=0)
  # Room for the names below each other.
  height = max(height, TITLE + _GAP * len(names) + 34)
  xs = [x for s in series for x, _ in s.points]
  ys = [y for s in series for _, y in s.points if y is not None]
  ys += [v for s in series for _, *ends in s.intervals for v in ends]
  ys += [] if chance is None else [chance]
  bottom = height - 34
  y_scale = make_scale(ys, bottom, TITLE + 6, log=log_y)
  y_ticks = list_ticks(y_scale)
  left = 8 + max(text_width(format_short(t), TEXT) for t in y_ticks)
  margin = 0.04 if any(s.style == "dots" for s in series) else 0.0
  x_scale = make_scale(xs, left, WIDTH - right, log=log_x, margin=margin)
  parts = [*_axes(x_scale, y_scale, y_ticks, x_label, bottom)]
  if chance is not None and (chance > 0 or not log_y):
    parts += _chance_line(left, y_scale(chance), WIDTH - right, chance)
  for line in series:
    parts += _draw_series(line, x_scale, y_scale)
  shown = [
    (s, n, y_scale(y))
    for s, n in zip(labelled, names, strict=True)
    if (y := _find_last(s, log=log_y)) is not None
  ]
  places = spread([y for *_, y in shown], low=TITLE + 8, high=bottom)
  for (line, text, y), place in zip(shown, places, strict=True):
    x = WIDTH - right
    leader = f"M{x:.1f} {y:.1f}L{x + 6:.1f} {place:.1f}"
    parts.append(
      f"<g class='c{line.colour % COLOURS}'><path class='leader' d='{leader}'/>"
      f"<circle cx='{x + 7:.1f}' cy='{place:.1f}' r='2.5'/></g>"
      f"<text x='{x + 12:.1f}' y='{place + 4:.1f}'>{escape_line(text)}"
      f"{add_title(line.name)}</text>"
    )
  return make_chart(title, name, WIDTH, height, parts)


def _find_last(series: Series, *, log: bool) -> Number | None:
  """The last value that is drawn, if any."""
  return next((y for _, y in series.points[::-1] if is_drawn(y, log=log)), None)


def _axes(
  x_scale: Scale,
  y_scale: Scale,
  y_ticks: Sequence[Number],
  x_label: str,
  bottom: Number,
) -> Iterator[str]:
  left, right = x_scale.start, x_scale.end
  for tick in y_ticks:
    y = y_scale(tick)
    yield f"<path class='grid' d='M{left:.1f} {y:.1f}H{right:.1f}'/>"
    yield draw_text(left - 4, y + 4, format_short(tick), "tick end")
  yield from draw_x_axis(x_scale, TITLE, bottom)
  yield draw_text((left + right) / 2, bottom + 30, x_label, "tick middle")


def _chance_line(
  left: Number, y: Number, right: Number, chance: Number
) -> list[str]:
  return [
    f"<path class='chance' d='M{left:.1f} {y:.1f}H{right:.1f}'>"
    f"<title>chance: {chance:.4g}</title></path>",
    draw_text(right - 2, y - 3, "chance", "tick end"),
  ]


def _draw_series(line: Series, x_scale: Scale, y_scale: Scale) -> Iterator[str]:
  yield f"<g class='c{line.colour % COLOURS}'>"
  dash = _DASHES[line.colour // COLOURS % len(_DASHES)]
  dash = f" stroke-dasharray='{dash}'" if dash else ""
  css = "line dashed" if line.style == "dashed" else "line"
  ends = [
    (x_scale(x), y_scale(low), y_scale(high))
    for x, low, high in line.intervals
    if is_drawn(low, log=y_scale.log) and is_drawn(high)
  ]
  if line.style == "dots":
    for x, low, high in ends:
      yield f"<path class='bar' d='M{x:.1f} {low:.1f}V{high:.1f}'/>"
  elif len(ends) > 1:
    upper = " ".join(f"{x:.1f},{high:.1f}" for x, _, high in ends)
    lower = " ".join(f"{x:.1f},{low:.1f}" for x, low, _ in reversed(ends))
    yield f"<polygon class='band' points='{upper} {lower}'/>"
  if line.style != "dots":
    path = trace(line.points, x_scale, y_scale)
    yield f"<path class='{css}'{dash} d='{path}'>{add_title(line.name)}</path>"
  if line.style == "dots" or len(line.points) <= 12 and line.style == "line":
    for x, y in line.points:
      if not is_drawn(y, log=y_scale.log):
        continue
      yield (
        f"<circle cx='{x_scale(x):.1f}' cy='{y_scale(y):.1f}' r='2.5'>"
        f"{add_title(f'{line.name}: {y:.4g} at {x:.6g}')}</circle>"
      )
  yield "</g>"


def trace(
  points: Sequence[tuple[Number, Number | None]], x_scale: Scale, y_scale: Scale
) -> str:
  """The path through points; a value that is missing interrupts it."""
  parts, pen = [], "M"
  for x, y in points:
    if not is_drawn(y, log=y_scale.log):
      pen = "M"
      continue
    parts.append(f"{pen}{x_scale(x):.1f} {y_scale(y):.1f}")
    pen = "L"
  return "".join(parts)


def spread(
  heights: Sequence[Number], *, low: Number, high: Number, gap: Number = _GAP
) -> list[Number]:
  """Positions of labels, `gap` apart, in order and near their heights.

  Labels that don't fit between `low` and `high` go on below.
  """
  order = sorted(range(len(heights)), key=lambda i: heights[i])
  # Blocks of labels that touch: [first position, indices].
  blocks: list[tuple[Number, list[int]]] = []
  for i in order:
    block = [i]
    while True:
      # The mean of what each label of the block would like.
      top = sum(heights[k] - gap * n for n, k in enumerate(block)) / len(block)
      top = max(min(top, high - gap * (len(block) - 1)), low)
      if not blocks or blocks[-1][0] + gap * len(blocks[-1][1]) <= top:
        break
      block = blocks.pop()[1] + block
    blocks.append((top, block))
  placed = [0.0] * len(heights)
  for top, block in blocks:
    for n, i in enumerate(block):
      placed[i] = top + gap * n
  return placed


def thin_out(
  points: Sequence[tuple[Number, Number]], *, count: int = 160
) -> list[tuple[Number, Number]]:
  """At most `count` points: the means of equal numbers of neighbours."""
  size = math.ceil(len(points) / count)
  if size <= 1:
    return list(points)
  groups = [points[i : i + size] for i in range(0, len(points), size)]
  return [
    (
      sum(x for x, _ in group) / len(group),
      sum(y for _, y in group) / len(group),
    )
    for group in groups
  ]
