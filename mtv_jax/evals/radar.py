"""A radar chart: several encoders on several figures, each with its scale."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_INK, _FAINT, _PAPER = (24, 24, 28), (205, 205, 200), (255, 255, 255)
# Told apart by most colour-blind people (Okabe and Ito 2008), black left out.
_COLOURS = (
  (213, 94, 0),
  (0, 114, 178),
  (0, 158, 115),
  (204, 121, 167),
  (230, 159, 0),
  (86, 180, 233),
  (148, 103, 189),
  (140, 86, 75),
)
_SMOOTH = 3  # Drawn this much larger and shrunk, for lack of antialiasing.
_RADIUS, _LABEL, _MARGIN, _LEGEND = 270, 200, 90, 300
_FLOOR = (130, 130, 130)
_RINGS = 4


@dataclasses.dataclass(frozen=True)
class Axis:
  """One figure.

  Attributes:
    label: what it is, one or two lines.
    centre: the value in the middle.
    rim: the value at the rim, the better one; below `centre` where less is
      better.
    unit: of both.
  """

  label: str
  centre: int | float
  rim: int | float
  unit: str = ""


@dataclasses.dataclass(frozen=True)
class Series:
  """One encoder.

  Attributes:
    name: for the legend.
    values: one an axis, None where there is none.
    style: `solid` for what was measured here, `dashed` for what is quoted, and
      `floor` for what needs no encoder.
  """

  name: str
  values: tuple[int | float | None, ...]
  style: str = "solid"


def axis(
  label: str, values: Sequence[float | None], *, unit: str, lower: bool
) -> Axis:
  """An axis that holds all of some values, with round ends.

  Where more is better it begins at 0, so that lengths compare; where less is
  better it ends at the round number below the least value and begins at the
  one above the greatest.

  Raises:
    ValueError: if there is no value.
  """
  known = [float(v) for v in values if v is not None and math.isfinite(v)]
  if not known:
    raise ValueError(f"radar: no encoder has a value of {label!r}")
  low, high = min(known), max(known)
  if lower:
    centre, rim = _round(high, math.ceil), _round(low, math.floor)
  else:
    centre, rim = min(0.0, _round(low, math.floor)), _round(high, math.ceil)
    rim = min(rim, 100.0) if unit == "%" and high <= 100 else rim
  if centre == rim:
    centre, rim = (rim + 1, rim) if lower else (centre, centre + 1)
  return Axis(label, centre, rim, unit)


def _round(value: float, towards) -> float:
  """To one digit and a half (1, 1.5, 2, ... 9.5), up or down."""
  if value == 0:
    return 0.0
  step = 10.0 ** math.floor(math.log10(abs(value))) / 2
  # The quotient of 0.6 and 0.05 is a hair above 12.
  return round(towards(round(value / step, 9)) * step, 9)


def place(axis: Axis, value: float) -> float:
  """How far out a value lies: 0 in the middle, 1 at the rim, never beyond."""
  share = (value - axis.centre) / (axis.rim - axis.centre)
  return min(max(share, 0.0), 1.0)


def draw(
  axes: Sequence[Axis], series: Sequence[Series], *, title: str = ""
) -> UInt8[np.ndarray, "h w 3"]:
  """The chart with its legend.

  Args:
    axes: at least three, clockwise from the top.
    series: in the order of the legend; the first is drawn last, on top.
    title: above the legend.

  Raises:
    ValueError: for fewer than three axes, which span no area.
  """
  if len(axes) < 3:
    raise ValueError(f"a radar needs at least 3 axes; got {len(axes)}")
  wheel = itertools.cycle(_COLOURS)
  colours = {
    s.name: _FLOOR if s.style == "floor" else next(wheel) for s in series
  }
  canvas = _Canvas(axes)
  canvas.grid()
  # All faint areas first, so that none tints another's lines.
  for one in series:
    canvas.area(one, colours[one.name])
  for one in reversed(series):
    canvas.polygon(one, colours[one.name])
  canvas.labels()
  canvas.legend(series, colours, title)
  size = tuple(side // _SMOOTH for side in canvas.image.size)
  return np.asarray(canvas.image.resize(size, Image.Resampling.LANCZOS))


class _Canvas:
  def __init__(self, axes: Sequence[Axis]):
    self.axes = axes
    side = 2 * (_RADIUS + _MARGIN)
    width = 2 * (_RADIUS + _LABEL) + _LEGEND
    size = (width * _SMOOTH, side * _SMOOTH)
    self.image = Image.new("RGB", size, _PAPER)
    self.pen = ImageDraw.Draw(self.image, "RGBA")
    self.middle = (_RADIUS + _LABEL, side / 2)
    turn = 2 * math.pi / len(axes)
    self.angles = [i * turn - math.pi / 2 for i in range(len(axes))]

  def at(self, i: int, share: float) -> tuple[float, float]:
    x, y = self.middle
    reach, angle = share * _RADIUS, self.angles[i]
    return (
      (x + reach * math.cos(angle)) * _SMOOTH,
      (y + reach * math.sin(angle)) * _SMOOTH,
    )

  def grid(self) -> None:
    count = len(self.axes)
    for ring in range(1, _RINGS + 1):
      corners = [self.at(i, ring / _RINGS) for i in range(count)]
      self.pen.line([*corners, corners[0]], _FAINT, _SMOOTH)
    for i in range(count):
      self.pen.line([self.at(i, 0.0), self.at(i, 1.0)], _FAINT, _SMOOTH)

  def points(self, series: Series) -> list[tuple[float, float] | None]:
    return [
      None if v is None or not math.isfinite(v) else self.at(i, place(axis, v))
      for i, (axis, v) in enumerate(zip(self.axes, series.values, strict=True))
    ]

  def area(self, series: Series, colour: tuple[int, int, int]) -> None:
    points = self.points(series)
    if series.style == "solid" and None not in points:
      self.pen.polygon(points, fill=(*colour, 28))

  def polygon(self, series: Series, colour: tuple[int, int, int]) -> None:
    points = self.points(series)
    # A missing value leaves its two sides open.
    for a, b in zip(points, points[1:] + points[:1], strict=True):
      if a is not None and b is not None:
        self.stroke(a, b, series.style, colour)
    for point in points:
      if point is not None:
        self.dot(point, colour)

  def stroke(self, a, b, style: str, colour) -> None:
    width = (4 if style == "solid" else 2) * _SMOOTH
    if style == "solid":
      self.pen.line([a, b], colour, width)
      return
    dash = (9 if style == "dashed" else 3) * _SMOOTH
    length = math.dist(a, b)
    for k in range(0, int(length), 2 * dash):
      ends = (k / length, min(k + dash, length) / length)
      line = [
        tuple(p + t * (q - p) for p, q in zip(a, b, strict=True)) for t in ends
      ]
      self.pen.line(line, colour, width)

  def dot(self, point, colour) -> None:
    (x, y), r = point, 4 * _SMOOTH
    self.pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

  def labels(self) -> None:
    for i, axis in enumerate(self.axes):
      unit = f" {axis.unit}" if axis.unit else ""
      ends = f"{axis.centre:g} to {axis.rim:g}{unit}"
      x, y = self.at(i, 1 + 14 / _RADIUS)
      cos, sin = math.cos(self.angles[i]), math.sin(self.angles[i])
      across = "l" if cos > 0.2 else "r" if cos < -0.2 else "m"
      lines = [*axis.label.split("\n"), ends]
      height = 17 * _SMOOTH
      # From the point outwards: below it at the bottom, above it at the top.
      top = y + (sin - 1) / 2 * height * len(lines)
      for k, line in enumerate(lines):
        last = k == len(lines) - 1
        font = _font(12 if last else 15)
        ink = (110, 110, 110) if last else _INK
        place = (x, top + k * height)
        self.pen.text(place, line, ink, font, anchor=f"{across}a")

  def legend(self, series, colours, title: str) -> None:
    x = 2 * (_RADIUS + _LABEL) * _SMOOTH
    y = 40 * _SMOOTH
    limit = (_LEGEND - 60) * _SMOOTH
    if title:
      self.pen.text((x, y), title, _INK, _font(15))
      y += 32 * _SMOOTH
    for one in series:
      middle = y + 10 * _SMOOTH
      ends = ((x, middle), (x + 34 * _SMOOTH, middle))
      self.stroke(*ends, one.style, colours[one.name])
      name, font = one.name, _font(15)
      while font.getlength(name) > limit:
        name = f"...{name[4:]}" if name.startswith("...") else f"...{name[3:]}"
      self.pen.text((x + 44 * _SMOOTH, y), name, _INK, font)
      y += 26 * _SMOOTH


def _font(size: int) -> ImageFont.FreeTypeFont:
  return ImageFont.load_default(size * _SMOOTH)
