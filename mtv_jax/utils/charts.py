"""SVG charts: curves, values with intervals, heat maps.

Sizes are in CSS pixels and are not scaled, so that text keeps its size: every
chart but a wide heat map fits a phone. Colours are those of `html.THEME`, light
or dark. Marks have titles, which a browser shows under the pointer.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mtv_jax.utils.html import COLOURS, SVG_STYLE, THEME, escape
from mtv_jax.utils.plots import one_line, shorten, text_width

Number = int | float

WIDTH = 340
_TEXT, _ROW = 12, 24
_TITLE = 24  # Height of the title's line.
_GAP = 14  # Between the names of series.
_CELL_WIDTH, _CELL_HEIGHT = 44, 24
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


class Chart(NamedTuple):
  """A drawn chart."""

  title: str
  svg: str
  name: str  # of its file, without a suffix


class Series(NamedTuple):
  """One curve, or one set of points."""

  name: str
  points: Sequence[tuple[Number, Number | None]]  # (x, y); None: no value
  colour: int = 0
  # (x, low, high), drawn as an area, or as bars through dots.
  intervals: Sequence[tuple[Number, Number, Number]] = ()
  style: str = "line"  # or "dots", or "dashed", which has no label


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
  """A scale over the finite values, with a margin of its length at both ends.

  Values that are all equal, or no values, get a scale of length 1, or of a
  factor of 2 if logarithmic; this leaves out values that are not positive.
  """
  known = [float(v) for v in values if math.isfinite(v) and (v > 0 or not log)]
  low, high = (min(known), max(known)) if known else (1.0, 1.0)
  if log:
    if high / low < 1 + 1e-9:
      low, high = low / math.sqrt(2), high * math.sqrt(2)
    factor = (high / low) ** margin
    return Scale(low / factor, high * factor, start, end, log=True)
  if high - low <= 1e-9 * max(abs(low), abs(high)):
    low, high = low - 0.5, high + 0.5
  extra = margin * (high - low)
  return Scale(low - extra, high + extra, start, end)


def list_ticks(scale: Scale, *, count: int = 4) -> list[Number]:
  """About `count` round values on a scale: 1, 2 or 5 times powers of ten."""
  if scale.log:
    exponents = range(
      math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1
    )
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
  chosen = next(i for i, step in enumerate(steps) if step >= 0.999 * raw)
  # A smaller step where there would be no two ticks.
  for step in reversed(steps[: chosen + 1]):
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    if last > first:
      break
  return [k * step for k in range(first, last + 1)]


def format_tick(value: Number) -> str:
  """A short number: 0.25, 400, 12k, 1.5M, 2e-05."""
  if value == 0:
    return "0"
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:.3g}{unit}"
  return f"{value:.4g}" if abs(value) < 0.001 else f"{round(value, 6):g}"


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
  names = [shorten(s.name, 84, _TEXT) for s in labelled]
  right = 14 + max([text_width(n, _TEXT) for n in names], default=0)
  # Room for the names below each other.
  height = max(height, _TITLE + _GAP * len(names) + 34)
  xs = [x for s in series for x, _ in s.points]
  ys = [y for s in series for _, y in s.points if y is not None]
  ys += [v for s in series for _, *ends in s.intervals for v in ends]
  ys += [] if chance is None else [chance]
  bottom = height - 34
  y_scale = make_scale(ys, bottom, _TITLE + 6, log=log_y)
  y_ticks = list_ticks(y_scale)
  left = 8 + max(text_width(format_tick(t), _TEXT) for t in y_ticks)
  margin = 0.04 if any(s.style == "dots" for s in series) else 0.0
  x_scale = make_scale(xs, left, WIDTH - right, log=log_x, margin=margin)
  parts = [*_axes(x_scale, y_scale, y_ticks, x_label, bottom)]
  if chance is not None and (chance > 0 or not log_y):
    parts += _chance_line(left, y_scale(chance), WIDTH - right, chance)
  for line in series:
    parts += _draw_series(line, x_scale, y_scale)
  heights = [y_scale(_last(s)) for s in labelled if _last(s) is not None]
  shown = [
    (s, n) for s, n in zip(labelled, names, strict=True) if _last(s) is not None
  ]
  for (line, text), y, place in zip(
    shown, heights, spread(heights, low=_TITLE + 8, high=bottom), strict=True
  ):
    x = WIDTH - right
    leader = f"M{x:.1f} {y:.1f}L{x + 6:.1f} {place:.1f}"
    parts.append(
      f"<g class='c{line.colour % COLOURS}'><path class='leader' d='{leader}'/>"
      f"<circle cx='{x + 7:.1f}' cy='{place:.1f}' r='2.5'/></g>"
      f"<text x='{x + 12:.1f}' y='{place + 4:.1f}'>{_escape(text)}"
      f"<title>{_escape(line.name)}</title></text>"
    )
  return _chart(title, name, WIDTH, height, parts)


def _last(series: Series) -> Number | None:
  known = [y for _, y in series.points if y is not None and math.isfinite(y)]
  return known[-1] if known else None


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
    yield _text(left - 4, y + 4, format_tick(tick), "tick end")
  yield from _x_axis(x_scale, _TITLE, bottom)
  yield _text((left + right) / 2, bottom + 30, x_label, "tick middle")


def _x_axis(scale: Scale, top: Number, bottom: Number) -> Iterator[str]:
  yield f"<path class='axis' d='M{scale.start:.1f} {bottom}H{scale.end:.1f}'/>"
  space = abs(scale.end - scale.start) / 44
  for tick in list_ticks(scale, count=max(2, min(5, int(space)))):
    x = scale(tick)
    yield f"<path class='grid' d='M{x:.1f} {top}V{bottom}'/>"
    yield _text(x, bottom + 15, format_tick(tick), "tick middle")


def _chance_line(
  left: Number, y: Number, right: Number, chance: Number
) -> list[str]:
  return [
    f"<path class='chance' d='M{left:.1f} {y:.1f}H{right:.1f}'>"
    f"<title>chance: {chance:.4g}</title></path>",
    _text(right - 2, y - 3, "chance", "tick end"),
  ]


def _draw_series(line: Series, x_scale: Scale, y_scale: Scale) -> Iterator[str]:
  yield f"<g class='c{line.colour % COLOURS}'>"
  dash = _DASHES[line.colour // COLOURS % len(_DASHES)]
  dash = f" stroke-dasharray='{dash}'" if dash else ""
  css = "line dashed" if line.style == "dashed" else "line"
  ends = [
    (x_scale(x), y_scale(low), y_scale(high))
    for x, low, high in line.intervals
    if low > 0 or not y_scale.log
  ]
  if line.style == "dots":
    for x, low, high in ends:
      yield f"<path class='bar' d='M{x:.1f} {low:.1f}V{high:.1f}'/>"
  elif len(ends) > 1:
    upper = " ".join(f"{x:.1f},{high:.1f}" for x, _, high in ends)
    lower = " ".join(f"{x:.1f},{low:.1f}" for x, low, _ in reversed(ends))
    yield f"<polygon class='band' points='{upper} {lower}'/>"
  title = f"<title>{_escape(line.name)}</title>"
  if line.style != "dots":
    path = trace(line.points, x_scale, y_scale)
    yield f"<path class='{css}'{dash} d='{path}'>{title}</path>"
  if line.style == "dots" or len(line.points) <= 12 and line.style == "line":
    for x, y in line.points:
      if y is None or not math.isfinite(y) or (y_scale.log and y <= 0):
        continue
      yield (
        f"<circle cx='{x_scale(x):.1f}' cy='{y_scale(y):.1f}' r='2.5'>"
        f"<title>{_escape(line.name)}: {y:.4g} at {x:.6g}</title></circle>"
      )
  yield "</g>"


def trace(
  points: Sequence[tuple[Number, Number | None]], x_scale: Scale, y_scale: Scale
) -> str:
  """The path through points; a value that is missing interrupts it."""
  parts, pen = [], "M"
  for x, y in points:
    if y is None or not math.isfinite(y) or (y_scale.log and y <= 0):
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


def interval_plot(
  title: str,
  rows: Sequence[Row],
  *,
  name: str,
  unit: str,
  lower: bool = False,
) -> Chart:
  """Values with intervals, a row each: a forest plot.

  The axis spans chance and every interval. A dashed line is at chance, from row
  to row where rows have their own.
  """
  labels = [shorten(row.name, 120, _TEXT) for row in rows]
  left = 10 + max([text_width(label, _TEXT) for label in labels], default=0)
  texts = [_value_text(row.value) for row in rows]
  right = 10 + max([text_width(text, _TEXT) for text in texts], default=0)
  known = [row.value for row in rows] + [row.chance for row in rows]
  known += [v for r in rows for v in (r.low, r.high, *r.points)]
  known = [v for v in known if v is not None]
  top, bottom = _TITLE, _TITLE + _ROW * len(rows) + 4
  scale = make_scale(known, left + 4, WIDTH - right)
  parts = [*_x_axis(scale, top, bottom)]
  for i, row in enumerate(rows):
    middle = top + _ROW * (i + 0.5) + 2
    parts.append(
      f"<text x='{left - 4:.1f}' y='{middle + 4:.1f}' class='end'>"
      f"{_escape(labels[i])}<title>{_escape(row.name)}</title></text>"
    )
    parts += _draw_interval(row, scale, middle, unit)
    parts.append(_text(WIDTH - 2, middle + 4, texts[i], "tick end"))
  chances = [row.chance for row in rows if row.chance is not None]
  legend = " ".join(
    [unit, "· lower is better" * lower, "· dashed: chance" * bool(chances)]
  )
  legend = " ".join(legend.split()).lstrip("· ")
  space = max(WIDTH - 2 - text_width(legend, _TEXT), 2)
  parts.append(_text(min(left, space), bottom + 31, legend, "tick"))
  return _chart(title, name, WIDTH, bottom + 38, parts)


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
      f"<title>chance: {row.chance:.4g} {_escape(unit)}</title></path>"
    )
  if row.value is None or not math.isfinite(row.value):
    return
  text = f"{row.name}: {row.value:.4g} {unit}"
  yield f"<g class='c{row.colour % COLOURS}'>"
  for point in row.points:
    yield f"<circle class='seed' cx='{scale(point):.1f}' cy='{y}' r='2.5'/>"
  if row.low is not None and row.high is not None:
    low, high = scale(row.low), scale(row.high)
    text += f", {row.low:.4g} to {row.high:.4g}"
    yield (
      f"<path class='bar' d='M{low:.1f} {y}H{high:.1f}"
      f"M{low:.1f} {y - 4}V{y + 4}M{high:.1f} {y - 4}V{y + 4}'/>"
    )
  text += f". {row.note}" if row.note else ""
  hollow = " class='hollow'" if row.hollow else ""
  yield (
    f"<circle{hollow} cx='{scale(row.value):.1f}' cy='{y}' r='4.5'>"
    f"<title>{_escape(text)}</title></circle></g>"
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
  labels = [shorten(row, 150, _TEXT) for row in rows]
  left = 8 + max([text_width(label, _TEXT) for label in labels], default=0)
  heads = [shorten(column, 110, _TEXT) for column in columns]
  longest = max([text_width(head, _TEXT) for head in heads], default=0)
  # Heads that are wider than their cell are slanted.
  slanted = longest > _CELL_WIDTH - 4
  head = longest * 0.64 + 14 if slanted else 18
  top = _TITLE + head + (16 if x_label else 0)
  parts = []
  if x_label:
    parts.append(_text(left, _TITLE + 12, x_label, "tick"))
  for k, column in enumerate(heads):
    x = left + _CELL_WIDTH * (k + 0.5)
    turn = f" transform='rotate(-40 {x:.1f} {top - 6:.1f})'" if slanted else ""
    css = "" if slanted else " class='middle'"
    parts.append(
      f"<text x='{x:.1f}' y='{top - 6:.1f}'{css}{turn}>{_escape(column)}</text>"
    )
  for i, row in enumerate(values):
    y = top + _CELL_HEIGHT * i
    parts.append(_text(left - 5, y + 16, labels[i], "end"))
    for k, value in enumerate(row):
      x = left + _CELL_WIDTH * k
      label = f"{rows[i]}, {columns[k]}"
      bold = marks is not None and marks[i][k]
      parts.append(_draw_cell(x, y, value, limit, label, bold=bold))
  width = left + _CELL_WIDTH * len(columns) + (longest * 0.77) * slanted
  width = max(width + 4, text_width(title, 13) + 8)
  return _chart(title, name, width, top + _CELL_HEIGHT * len(rows) + 4, parts)


def _draw_cell(
  x: Number, y: Number, value: Number | None, limit: Number, label: str, *, bold
) -> str:
  box = f"x='{x:.1f}' y='{y:.1f}' width='{_CELL_WIDTH - 1}'"
  box += f" height='{_CELL_HEIGHT - 1}'"
  if value is None or not math.isfinite(value):
    title = f"<title>{_escape(label)}: no value</title>"
    return f"<rect class='empty' {box}>{title}</rect>"
  share = min(abs(value) / limit, 1.0)
  css = "negative" if value < 0 else "positive"
  text = _cell_text(value, limit)
  weight = " bold" if bold else ""
  return (
    f"<rect class='{css}' {box} fill-opacity='{0.75 * share:.2f}'>"
    f"<title>{_escape(label)}: {value:.4g}</title></rect>"
    f"<text class='middle cell{weight}' x='{x + _CELL_WIDTH / 2:.1f}' "
    f"y='{y + 16:.1f}'>{text}</text>"
  )


def _cell_text(value: Number, limit: Number) -> str:
  """Five characters at most, with as many digits as the largest value has."""
  digits = 2 if limit < 10 else 1 if limit < 100 else 0
  text = f"{value:.{digits}f}" if limit < 1e4 else f"{value:.0e}"
  return text.lstrip("-") if float(text) == 0 else text.replace("-", "\u2212")


def _escape(text: str) -> str:
  return escape(one_line(text))


def _text(x: Number, y: Number, text: str, css: str) -> str:
  return f"<text x='{x:.1f}' y='{y:.1f}' class='{css}'>{_escape(text)}</text>"


def _chart(
  title: str, name: str, width: Number, height: Number, parts: Sequence[str]
) -> Chart:
  width, height = math.ceil(width), math.ceil(height)
  heading, label = _escape(shorten(title, width - 4, 13)), _escape(title)
  svg = (
    f"<svg class='chart' role='img' aria-label='{label}' width='{width}' "
    f"height='{height}' viewBox='0 0 {width} {height}'>"
    f"<text x='2' y='15' class='title'>{heading}<title>{label}</title></text>"
    f"{''.join(parts)}</svg>"
  )
  return Chart(title, svg, name)


def to_file(chart: Chart) -> str:
  """The chart as an SVG file, which follows light or dark by itself."""
  return chart.svg.replace(
    "<svg ", "<svg xmlns='http://www.w3.org/2000/svg' ", 1
  ).replace(">", f"><style>{THEME}{SVG_STYLE}</style>", 1)


def write_files(
  drawn: Sequence[Chart], folder: pathlib.Path
) -> list[pathlib.Path]:
  """Writes `charts/NAME.svg`, which Markdown links to; returns the paths."""
  paths = [folder / f"charts/{chart.name}.svg" for chart in drawn]
  (folder / "charts").mkdir(parents=True, exist_ok=True)
  for path, chart in zip(paths, drawn, strict=True):
    path.write_text(to_file(chart), encoding="utf-8")
  return paths


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
