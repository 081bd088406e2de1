"""SVG charts: curves, values with intervals, heat maps.

Sizes are in CSS pixels and never scaled. Every chart but a wide heat map fits a
phone. Browsers show the titles of marks on hover.
"""

from __future__ import annotations

import functools
import html
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtv_jax.utils.plots import shorten, text_width
from mtv_jax.utils.text import Number, format_short, one_line

COLOURS = 8  # of series, in chart.css
WIDTH = 340
FONT_SIZE = 12  # In pixels.
_MAX_SCALED = 540  # Charts up to this width scale with the window.
TITLE = 24  # Height of the title's line.
_MAX_DRAWN = 1e300  # Larger values are not drawn.
_LEGEND = 16  # Height of a legend's line.
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_ROW = 24  # Height of a row.
_CELL = 44  # Width of a cell; its height is `_ROW`.


@functools.cache
def read_css(name: str) -> str:
  """A style sheet of this folder."""
  return pathlib.Path(__file__).with_name(f"{name}.css").read_text()


def escape(text: Any) -> str:
  """Escapes text and attributes; lone surrogates become `?`."""
  return html.escape(str(text).encode("utf-8", "replace").decode())


class Chart(NamedTuple):
  """A drawn chart."""

  title: str
  svg: str
  name: str  # file name without suffix


class Scale(NamedTuple):
  """Maps `low` to the pixel `start` and `high` to `end`."""

  low: Number
  high: Number
  start: Number
  end: Number
  log: bool = False

  def __call__(self, value: Number) -> Number:
    low, high = self.low, self.high
    if self.log:
      low, high, value = map(math.log, (low, high, value))
    return self.start + (value - low) / (high - low) * (self.end - self.start)


def make_scale(
  values: Sequence[Number],
  start: Number,
  end: Number,
  *,
  log: bool = False,
  margin: Number = 0.05,
) -> Scale:
  """A scale over the drawable values, extended by relative `margin`."""
  drawable = [float(v) for v in values if is_drawable(v, log=log)]
  low, high = (min(drawable), max(drawable)) if drawable else (1.0, 1.0)
  if log:
    if high / low < 1 + 1e-9:
      low, high = low / math.sqrt(2), high * math.sqrt(2)
    factor = (high / low) ** margin
    return Scale(low / factor, high * factor, start, end, log=True)
  if high - low <= 1e-9 * max(abs(low), abs(high)):
    low, high = low - 0.5, high + 0.5
  padding = margin * (high - low)
  return Scale(low - padding, high + padding, start, end)


def list_ticks(scale: Scale, *, count: int = 4) -> list[Number]:
  """About `count` round values on a scale: 1, 2 or 5 times powers of ten."""
  if scale.log:
    low, high = math.log10(scale.low), math.log10(scale.high)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
      ticks = [d * 10.0**e for e in exponents for d in digits]
      ticks = [t for t in ticks if scale.low <= t <= scale.high]
      if len(ticks) >= 3:
        return ticks[:: math.ceil(len(ticks) / (count + 2))]
    if len(ticks) > 1:
      return ticks
  raw = (scale.high - scale.low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  steps = [d * power for d in (0.2, 0.5, 1, 2, 5, 10)]
  start = next(i for i, step in enumerate(steps) if step >= 0.999 * raw)
  # Reduce the step until there are two ticks.
  for step in reversed(steps[: start + 1]):
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    if last > first:
      break
  return [k * step for k in range(first, last + 1)]


def is_drawable(value: Number | None, *, log: bool = False) -> bool:
  """Whether a scale can draw a value; logarithmic scales only above 0."""
  if value is None or not abs(value) < _MAX_DRAWN:  # Also rejects NaN.
    return False
  return value > 0 or not log


def draw_x_axis(scale: Scale, top: Number, bottom: Number) -> Iterator[str]:
  """The x axis at `bottom`, with tick labels and grid lines up to `top`."""
  yield f"<path class='axis' d='M{scale.start:.1f} {bottom}H{scale.end:.1f}'/>"
  space = abs(scale.end - scale.start) / 44
  for tick in list_ticks(scale, count=max(2, min(5, int(space)))):
    x = scale(tick)
    yield f"<path class='grid' d='M{x:.1f} {top}V{bottom}'/>"
    yield draw_text(x, bottom + 15, format_short(tick), "tick middle")


def draw_text(x: Number, y: Number, text: str, css: str) -> str:
  """One line of text; the classes `css` set its anchor."""
  return (
    f"<text x='{x:.1f}' y='{y:.1f}' class='{css}'>{escape_line(text)}</text>"
  )


def escape_line(text: str) -> str:
  """Escapes text for SVG, joined to one line."""
  return escape(one_line(text))


def add_title(text: str) -> str:
  """A `title` element, which browsers show on hover."""
  return f"<title>{escape_line(text)}</title>"


def make_chart(
  title: str, name: str, width: Number, height: Number, parts: Sequence[str]
) -> Chart:
  """Assembles SVG elements into a titled chart."""
  width, height = math.ceil(width), math.ceil(height)
  heading = escape_line(shorten(title, width - 4, 13))
  # A narrow window scales a chart, unless its text would be too small.
  style = "style='max-width:100%;height:auto' " if width <= _MAX_SCALED else ""
  svg = (
    f"<svg class='chart' role='img' aria-label='{escape_line(title)}' {style}"
    f"width='{width}' height='{height}' viewBox='0 0 {width} {height}'>"
    f"<text x='2' y='15' class='title'>{heading}{add_title(title)}</text>"
    f"{''.join(parts)}</svg>"
  )
  return Chart(title, svg, name)


def to_file(chart: Chart) -> str:
  """A standalone SVG file that adapts to light and dark mode."""
  return chart.svg.replace(
    "<svg ", "<svg xmlns='http://www.w3.org/2000/svg' ", 1
  ).replace(">", f"><style>{read_css('chart')}</style>", 1)


def _max_width(texts: Sequence[str]) -> float:
  return max([text_width(text, FONT_SIZE) for text in texts], default=0.0)


class Series(NamedTuple):
  """A curve or a set of points."""

  name: str
  points: Sequence[tuple[Number, Number | None]]  # (x, y); None if missing
  colour: int = 0
  # (x, low, high), drawn as a band, or as error bars for "dots".
  intervals: Sequence[tuple[Number, Number, Number]] = ()
  style: str = "line"  # "line", "dots" or "dashed" (unlabelled)


def line_chart(
  title: str,
  series: Sequence[Series],
  *,
  name: str,
  x_label: str,
  log_x: bool = False,
  log_y: bool = False,
  chance: Number | None = None,
) -> Chart:
  """Line chart with a legend below and a dashed line at `chance`."""
  labelled = [s for s in series if s.style != "dashed" and s.name and s.points]
  xs = [x for s in series for x, _ in s.points]
  ys = [y for s in series for _, y in s.points if y is not None]
  ys += [v for s in series for _, *ends in s.intervals for v in ends]
  ys += [] if chance is None else [chance]
  bottom, right = 176, WIDTH - 12
  y_scale = make_scale(ys, bottom, TITLE + 6, log=log_y)
  y_ticks = list_ticks(y_scale)
  left = 8 + _max_width([format_short(tick) for tick in y_ticks])
  margin = 0.04 if any(s.style == "dots" for s in series) else 0.0
  x_scale = make_scale(xs, left, right, log=log_x, margin=margin)
  parts = []
  for tick in y_ticks:
    y, end = y_scale(tick), x_scale.end
    parts.append(f"<path class='grid' d='M{left:.1f} {y:.1f}H{end:.1f}'/>")
    parts.append(draw_text(left - 4, y + 4, format_short(tick), "tick end"))
  parts += draw_x_axis(x_scale, TITLE, bottom)
  middle = (left + x_scale.end) / 2
  parts.append(draw_text(middle, bottom + 30, x_label, "tick middle"))
  if chance is not None and (chance > 0 or not log_y):
    y, end = y_scale(chance), right
    parts.append(
      f"<path class='chance' d='M{left:.1f} {y:.1f}H{end:.1f}'>"
      f"<title>chance: {chance:.4g}</title></path>"
    )
    parts.append(draw_text(end - 2, y - 3, "chance", "tick end"))
  for line in series:
    parts += _draw_series(line, x_scale, y_scale)
  for k, line in enumerate(labelled):
    x, y = left + k % 2 * (right - left) / 2, bottom + _LEGEND * (k // 2 + 3)
    text = shorten(line.name, (right - left) / 2 - 30, FONT_SIZE)
    parts.append(
      f"<g class='c{line.colour % COLOURS}'><path class='key'"
      f"{_dash(line)} d='M{x:.1f} {y - 4}h18'/></g>"
      f"<text x='{x + 23:.1f}' y='{y}'>{escape_line(text)}"
      f"{add_title(line.name)}</text>"
    )
  height = bottom + _LEGEND * (math.ceil(len(labelled) / 2) + 2) + 6
  return make_chart(title, name, WIDTH, height, parts)


def _dash(line: Series) -> str:
  """Tells series of equal colour apart."""
  dash = _DASHES[line.colour // COLOURS % len(_DASHES)]
  return f" stroke-dasharray='{dash}'" if dash else ""


def _draw_series(line: Series, x_scale: Scale, y_scale: Scale) -> Iterator[str]:
  yield f"<g class='c{line.colour % COLOURS}'>"
  css = "line dashed" if line.style == "dashed" else "line"
  ends = [
    (x_scale(x), y_scale(low), y_scale(high))
    for x, low, high in line.intervals
    if is_drawable(low, log=y_scale.log) and is_drawable(high)
  ]
  if line.style == "dots":
    for x, low, high in ends:
      yield f"<path class='bar' d='M{x:.1f} {low:.1f}V{high:.1f}'/>"
  elif len(ends) > 1:
    upper = " ".join(f"{x:.1f},{high:.1f}" for x, _, high in ends)
    lower = " ".join(f"{x:.1f},{low:.1f}" for x, low, _ in reversed(ends))
    yield f"<polygon class='band' points='{upper} {lower}'/>"
  if line.style != "dots":
    path, pen = "", "M"  # The pen is lifted at missing values.
    for x, y in line.points:
      has_value = is_drawable(y, log=y_scale.log)
      path += f"{pen}{x_scale(x):.1f} {y_scale(y):.1f}" if has_value else ""
      pen = "L" if has_value else "M"
    yield (
      f"<path class='{css}'{_dash(line)} d='{path}'>"
      f"{add_title(line.name)}</path>"
    )
  if line.style == "dots" or len(line.points) <= 12 and line.style == "line":
    for x, y in line.points:
      if not is_drawable(y, log=y_scale.log):
        continue
      yield (
        f"<circle cx='{x_scale(x):.1f}' cy='{y_scale(y):.1f}' r='2.5'>"
        f"{add_title(f'{line.name}: {y:.4g} at {x:.6g}')}</circle>"
      )
  yield "</g>"


def thin_out(
  points: Sequence[tuple[Number, Number]],
) -> list[tuple[Number, Number]]:
  """Downsamples to at most 160 points by averaging neighbours."""
  size = math.ceil(len(points) / 160)
  if size <= 1:
    return list(points)
  groups = [points[i : i + size] for i in range(0, len(points), size)]
  return [tuple(np.mean(group, axis=0).tolist()) for group in groups]


class Row(NamedTuple):
  """A row of `interval_plot`: a value with its interval."""

  name: str
  value: Number | None
  low: Number | None = None
  high: Number | None = None
  points: Sequence[Number] = ()  # single measurements, such as seeds
  chance: Number | None = None
  colour: int = 0
  note: str = ""  # shown on hover
  hollow: bool = False  # for published values


def mean_series(
  name: str,
  rows: Sequence[tuple[Number, Row]],
  colour: int,
  style: str = "line",
) -> Series:
  """The values of rows and their intervals over x; skips missing ones."""
  points = [(x, row.value) for x, row in rows if row.value is not None]
  intervals = [(x, r.low, r.high) for x, r in rows if r.low is not None]
  return Series(name, points, colour, intervals, style)


def interval_plot(
  title: str,
  rows: Sequence[Row],
  *,
  name: str,
  unit: str,
  lower: bool = False,
) -> Chart:
  """Forest plot: a value with its interval per row, and its chance dashed.

  Percent intervals are clipped to 0..100: over two seeds they may be wider.
  """
  labels = [shorten(row.name, 120, FONT_SIZE) for row in rows]
  left = 10 + _max_width(labels)
  texts = [_format_value(row.value) for row in rows]
  right_margin = 10 + _max_width(texts)
  values = [row.value for row in rows] + [row.chance for row in rows]
  values += [v for r in rows for v in (*_clip_interval(r, unit), *r.points)]
  top, bottom = TITLE, TITLE + _ROW * len(rows) + 4
  scale = make_scale(
    [v for v in values if is_drawable(v)], left + 4, WIDTH - right_margin
  )
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
  space = max(WIDTH - 2 - text_width(legend, FONT_SIZE), 2)
  parts.append(draw_text(min(left, space), bottom + 31, legend, "tick"))
  return make_chart(title, name, WIDTH, bottom + 38, parts)


def _clip_interval(row: Row, unit: str) -> tuple[Number, ...]:
  """Low and high, clipped for percent; () without a value or an interval."""
  value, low, high = row.value, row.low, row.high
  if None in (value, low, high):
    return ()
  if unit != "%":
    return low, high
  return max(low, min(0, value)), min(high, max(100, value))


def _format_value(value: Number | None) -> str:
  if not is_drawable(value):
    return "–"
  if abs(value) >= 10:
    return f"{value:.1f}" if abs(value) < 1e6 else f"{value:.1e}"
  return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _draw_interval(
  row: Row, scale: Scale, y: Number, unit: str
) -> Iterator[str]:
  if is_drawable(row.chance):
    x, half = scale(row.chance), _ROW / 2
    yield (
      f"<path class='chance' d='M{x:.1f} {y - half}V{y + half}'>"
      f"{add_title(f'chance: {row.chance:.4g} {unit}')}</path>"
    )
  if not is_drawable(row.value):
    return
  text = f"{row.name}: {row.value:.4g} {unit}"
  yield f"<g class='c{row.colour % COLOURS}'>"
  for point in row.points:
    yield f"<circle class='seed' cx='{scale(point):.1f}' cy='{y}' r='2.5'/>"
  interval = _clip_interval(row, unit)
  if interval and all(map(is_drawable, interval)):
    low, high = map(scale, interval)
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
) -> Chart:
  """Heat map of numbers, coloured by sign and magnitude.

  Colours saturate at `limit`, by default the largest magnitude.
  """
  magnitudes = [abs(v) for row in values for v in row if is_drawable(v)]
  limit = limit or max(magnitudes, default=0) or 1.0
  labels = [shorten(row, 150, FONT_SIZE) for row in rows]
  left = 8 + _max_width(labels)
  column_labels = [shorten(column, 110, FONT_SIZE) for column in columns]
  max_width = _max_width(column_labels)
  # Slant the column names if one is wider than its cell.
  is_slanted = max_width > _CELL - 4
  head_height = max_width * 0.64 + 14 if is_slanted else 18
  top = TITLE + head_height + (16 if x_label else 0)
  parts = []
  if x_label:
    parts.append(draw_text(left, TITLE + 12, x_label, "tick"))
  for k, column in enumerate(column_labels):
    x, y = left + _CELL * (k + 0.5), top - 6
    rotation = f" transform='rotate(-40 {x:.1f} {y:.1f})'" if is_slanted else ""
    css = "" if is_slanted else " class='middle'"
    text = escape_line(column)
    parts.append(f"<text x='{x:.1f}' y='{y:.1f}'{css}{rotation}>{text}</text>")
  for i, row in enumerate(values):
    y = top + _ROW * i
    parts.append(draw_text(left - 5, y + 16, labels[i], "end"))
    for k, value in enumerate(row):
      label = f"{rows[i]}, {columns[k]}"
      parts.append(_draw_cell(left + _CELL * k, y, value, limit, label))
  width = left + _CELL * len(columns) + (max_width * 0.77) * is_slanted
  # The title is bold and in the browser's font: leave extra width.
  width = max(width + 4, 1.2 * text_width(title, 13) + 8)
  return make_chart(title, name, width, top + _ROW * len(rows) + 4, parts)


def _draw_cell(
  x: Number, y: Number, value: Number | None, limit: Number, label: str
) -> str:
  box = f"x='{x:.1f}' y='{y:.1f}' width='{_CELL - 1}' height='{_ROW - 1}'"
  if not is_drawable(value):
    return f"<rect class='empty' {box}>{add_title(f'{label}: no value')}</rect>"
  share = min(abs(value) / limit, 1.0)
  css = "negative" if value < 0 else "positive"
  # At most five characters.
  digits = 2 if limit < 10 else 1 if limit < 100 else 0
  text = f"{value:.{digits}f}" if limit < 1e4 else f"{value:.0e}"
  text = text.lstrip("-") if float(text) == 0 else text.replace("-", "\u2212")
  return (
    f"<rect class='{css}' {box} fill-opacity='{0.75 * share:.2f}'>"
    f"{add_title(f'{label}: {value:.4g}')}</rect>"
    f"<text class='middle cell' x='{x + _CELL / 2:.1f}' "
    f"y='{y + 16:.1f}'>{text}</text>"
  )
