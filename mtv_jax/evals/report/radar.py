"""Radar chart of several encoders on several metrics, each with its scale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mtv_jax.utils.errors import InputError

# For most colour-blind readers too (Okabe and Ito 2008), without black.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
COLOURS += ("#e69f00", "#56b4e9", "#9467bd", "#8c564b")
_CHANCE_COLOUR = "#828282"
_LINES = {"solid": "-", "dashed": "--", "chance": ":"}
_RINGS = (0.25, 0.5, 0.75, 1.0)


class Axis(NamedTuple):
  """The axis of one metric, from its value at the centre to that at the rim.

  `rim` is less than `centre` where lower is better.
  """

  label: str
  centre: int | float
  rim: int | float
  unit: str = ""

  def radius(self, value: float) -> float:
    """The radius of a value: 0 at the centre, 1 at the rim and beyond."""
    share = (value - self.centre) / (self.rim - self.centre)
    return min(max(share, 0.0), 1.0)


class Series(NamedTuple):
  """The values of one encoder, one per axis, None if missing."""

  name: str
  values: tuple[int | float | None, ...]
  style: str = "solid"  # or "dashed" for published values, "chance"


def make_axis(
  label: str, values: Sequence[float | None], *, unit: str, lower: bool
) -> Axis:
  """An axis with round ends that spans some values.

  It begins at 0 where higher is better, so that lengths compare. Where lower
  is better, it goes from above the largest value to below the smallest one.

  Raises:
    InputError: if no value is finite.
  """
  known = [float(v) for v in values if v is not None and math.isfinite(v)]
  if not known:
    raise InputError(f"radar: no encoder has a value of {label!r}")
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
  # Rounded, as 0.6 / 0.05 is slightly more than 12.
  return round(towards(round(value / step, 9)) * step, 9)


def draw(
  axes: Sequence[Axis], series: Sequence[Series]
) -> UInt8[np.ndarray, "h w 3"]:
  """The chart as an image; see `plot`."""
  canvas = FigureCanvasAgg(plot(axes, series))
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def plot(axes: Sequence[Axis], series: Sequence[Series]) -> Figure:
  """The chart with its legend; axes are clockwise, the first series on top.

  Raises:
    InputError: for fewer than three axes, which span no area.
  """
  if len(axes) < 3:
    raise InputError(f"a radar chart needs at least 3 axes; got {len(axes)}")
  figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
  polar = figure.add_subplot(projection="polar")
  polar.set_theta_zero_location("N")
  polar.set_theta_direction(-1)
  polar.set_ylim(0, 1)
  angles = np.arange(len(axes)) * 2 * np.pi / len(axes)
  labels = [
    f"{a.label}\n{a.centre:g} to {a.rim:g} {a.unit}".rstrip() for a in axes
  ]
  polar.set_xticks(angles, labels, fontsize=9)
  polar.tick_params(axis="x", pad=24)
  polar.set_yticks(_RINGS, [""] * len(_RINGS))
  colours = itertools.cycle(COLOURS)
  for rank, line in enumerate(series):
    colour = _CHANCE_COLOUR if line.style == "chance" else next(colours)
    radii = [
      math.nan if v is None or not math.isfinite(v) else axis.radius(v)
      for axis, v in zip(axes, line.values, strict=True)
    ]
    # Closed polygons; a missing value leaves its two sides open.
    theta, r = np.append(angles, angles[0]), np.append(radii, radii[0])
    polar.plot(
      theta,
      r,
      _LINES[line.style],
      marker="o",
      markersize=4,
      color=colour,
      linewidth=2.5 if line.style == "solid" else 1.5,
      label=line.name,
      zorder=10 + len(series) - rank,
      clip_on=False,
    )
    if line.style == "solid" and np.isfinite(radii).all():
      polar.fill(theta, r, color=colour, alpha=0.1)
  figure.legend(loc="outside right upper", fontsize=9)
  return figure
