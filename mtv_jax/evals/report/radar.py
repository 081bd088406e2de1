"""A radar chart: several encoders on several figures, each with its scale."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Told apart by most colour-blind people (Okabe and Ito 2008), black left out.
COLOURS = (
  "#d55e00",
  "#0072b2",
  "#009e73",
  "#cc79a7",
  "#e69f00",
  "#56b4e9",
  "#9467bd",
  "#8c564b",
)
_FLOOR = "#828282"
_LINES = {"solid": "-", "dashed": "--", "floor": ":"}
_RINGS = (0.25, 0.5, 0.75, 1.0)


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
  canvas = FigureCanvasAgg(figure(axes, series, title=title))
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def figure(
  axes: Sequence[Axis], series: Sequence[Series], *, title: str = ""
) -> Figure:
  """`draw` before it is pixels."""
  drawn = Figure(figsize=(11, 7), dpi=100, layout="constrained")
  polar = drawn.add_subplot(projection="polar")
  polar.set_theta_zero_location("N")
  polar.set_theta_direction(-1)
  polar.set_ylim(0, 1)
  angles = np.arange(len(axes)) * 2 * np.pi / len(axes)
  polar.set_xticks(angles, [_label(axis) for axis in axes], fontsize=9)
  polar.tick_params(axis="x", pad=24)
  polar.set_yticks(_RINGS, [""] * len(_RINGS))
  wheel = itertools.cycle(COLOURS)
  for rank, one in enumerate(series):
    colour = _FLOOR if one.style == "floor" else next(wheel)
    shares = [
      math.nan if v is None or not math.isfinite(v) else place(axis, v)
      for axis, v in zip(axes, one.values, strict=True)
    ]
    # Round to the start again. A missing value leaves its two sides open.
    ring, reach = np.append(angles, angles[0]), np.append(shares, shares[0])
    order = 10 + len(series) - rank
    polar.plot(
      ring,
      reach,
      _LINES[one.style],
      marker="o",
      markersize=4,
      color=colour,
      linewidth=2.5 if one.style == "solid" else 1.5,
      label=one.name,
      zorder=order,
      clip_on=False,
    )
    if one.style == "solid" and np.isfinite(shares).all():
      polar.fill(ring, reach, color=colour, alpha=0.1)
  drawn.legend(loc="outside right upper", title=title or None, fontsize=9)
  return drawn


def _label(axis: Axis) -> str:
  unit = f" {axis.unit}" if axis.unit else ""
  return f"{axis.label}\n{axis.centre:g} to {axis.rim:g}{unit}"
