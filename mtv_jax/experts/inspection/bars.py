"""Histograms as drawings within a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtv_jax.utils.html import escape

_WIDTH, _HEIGHT = 300, 120
_LEFT, _TOP, _BOTTOM = 4, 22, 16
# Of a letter, about, to tell whether two labels would touch.
_LETTER = 6


def svg(histogram: Mapping[str, Any], title: str) -> str:
  """A histogram, each bar with its figures where the mouse rests.

  Args:
    histogram: from `Histogram.to_dict`, of at least one value.
    title: what is counted.
  """
  edges, counts = histogram["bars"]["edges"], histogram["bars"]["counts"]
  top = max(counts)
  step = (_WIDTH - 2 * _LEFT) / len(counts)
  room = _HEIGHT - _TOP - _BOTTOM
  parts = []
  for k, count in enumerate(counts):
    high = room * count / top
    # A bar that is there can be seen.
    high = max(high, 1) if count else 0
    x, y = _LEFT + k * step, _HEIGHT - _BOTTOM - high
    share = 100 * count / histogram["count"]
    tip = f"{_bar_name(histogram, k)}: {count:,} ({share:.3g} %)"
    parts.append(
      f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(step - 1, 0.5):.1f}'"
      f" height='{high:.1f}' fill='#2a6db0'><title>{escape(tip)}</title></rect>"
    )
  base = _HEIGHT - _BOTTOM + 0.5
  parts.append(f"<path d='M{_LEFT} {base}H{_WIDTH - _LEFT}' stroke='#18181c'/>")
  parts += _labels(histogram, edges, step)
  most = f"most: {top:,}"
  parts.append(_text(_LEFT, 12, title, "start", bold=True))
  if _LETTER * (len(title) + len(most)) < _WIDTH:
    parts.append(_text(_WIDTH - _LEFT, 12, most, "end"))
  return (
    f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'"
    f" aria-label='{escape(title)}'>{''.join(parts)}</svg>"
  )


def _bar_name(histogram: Mapping[str, Any], k: int) -> str:
  low, high = histogram["bars"]["edges"][k : k + 2]
  if histogram["values"] == "whole":
    first, last = round(low + 0.5), round(high - 0.5)
    return f"{first}" if first == last else f"{first} to {last}"
  return f"{low:.3g} to {high:.3g}"


def _labels(
  histogram: Mapping[str, Any], edges: Sequence[float], step: float
) -> list[str]:
  """Under the first bar, the middle one and the last."""
  n, y = len(edges) - 1, _HEIGHT - 4
  if histogram["values"] == "whole":
    places = sorted({0, n // 2, n - 1})
    at = [(k + 0.5, _bar_name(histogram, k)) for k in places]
  else:
    places = sorted({0, (n + 1) // 2, n})
    at = [(k, f"{edges[k]:.3g}") for k in places]
  parts = []
  for k, (place, words) in enumerate(at):
    anchor = "start" if k == 0 else "end" if k == len(at) - 1 else "middle"
    if histogram["values"] == "whole" and len(at) == 1:
      anchor = "middle"
    x = _LEFT + place * step
    if histogram["values"] == "whole" and anchor != "middle":
      x += -3 if anchor == "start" else 3
    parts.append(_text(x, y, words, anchor))
  return parts


def _text(
  x: float | int, y: float | int, words: str, anchor: str, *, bold: bool = False
) -> str:
  weight = " font-weight='bold'" if bold else ""
  return (
    f"<text x='{x:.1f}' y='{y}' font-size='11' fill='#18181c'{weight}"
    f" text-anchor='{anchor}'>{escape(words)}</text>"
  )
