"""Parts of every chart: its title, scales, axes, texts and file."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mtv_jax.report.style import SVG_STYLE, THEME, escape
from mtv_jax.utils import atomic
from mtv_jax.utils.plots import shorten
from mtv_jax.utils.text import format_short, one_line

Number = int | float

WIDTH = 340
TEXT = 12  # Height of letters.
TITLE = 24  # Height of the title's line.
_LARGEST = 1e300


class Chart(NamedTuple):
  """A drawn chart."""

  title: str
  svg: str
  name: str  # of its file, without a suffix


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
  known = [float(v) for v in values if is_drawn(v, log=log)]
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


def is_drawn(value: Number | None, *, log: bool = False) -> bool:
  """Whether a value has a place on a scale: finite, and above 0 if `log`.

  Values near the largest float would overflow the scale.
  """
  if value is None or not abs(value) < _LARGEST:  # Also NaN.
    return False
  return value > 0 or not log


def draw_x_axis(scale: Scale, top: Number, bottom: Number) -> Iterator[str]:
  """The axis at `bottom`, with ticks and lines up to `top`."""
  yield f"<path class='axis' d='M{scale.start:.1f} {bottom}H{scale.end:.1f}'/>"
  space = abs(scale.end - scale.start) / 44
  for tick in list_ticks(scale, count=max(2, min(5, int(space)))):
    x = scale(tick)
    yield f"<path class='grid' d='M{x:.1f} {top}V{bottom}'/>"
    yield draw_text(x, bottom + 15, format_short(tick), "tick middle")


def draw_text(x: Number, y: Number, text: str, css: str) -> str:
  """One line of text at a point; `css` has its anchor."""
  return (
    f"<text x='{x:.1f}' y='{y:.1f}' class='{css}'>{escape_line(text)}</text>"
  )


def escape_line(text: str) -> str:
  """Text on one line, for SVG."""
  return escape(one_line(text))


def add_title(text: str) -> str:
  """The element that a browser shows under the pointer."""
  return f"<title>{escape_line(text)}</title>"


def make_chart(
  title: str, name: str, width: Number, height: Number, parts: Sequence[str]
) -> Chart:
  """A chart of SVG elements, with its title."""
  width, height = math.ceil(width), math.ceil(height)
  heading = escape_line(shorten(title, width - 4, 13))
  svg = (
    f"<svg class='chart' role='img' aria-label='{escape_line(title)}' "
    f"width='{width}' height='{height}' viewBox='0 0 {width} {height}'>"
    f"<text x='2' y='15' class='title'>{heading}{add_title(title)}</text>"
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
    atomic.write_text(path, to_file(chart))
  return paths
