"""A run's figures over its steps, as small charts on one page."""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import re

from matplotlib.figure import Figure

_COLUMNS = 3


def read(run: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
  """Every figure of a run's `metrics.jsonl`, as (step, value) pairs.

  Raises:
    FileNotFoundError: if the run has measured nothing yet.
  """
  path = pathlib.Path(run) / "metrics.jsonl"
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is not there: {run} is no run's folder, or has not begun."
    )
  series = collections.defaultdict(dict)
  for line in path.read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    step = row.pop("step")
    for name, value in row.items():
      if isinstance(value, int | float):
        # A run that was resumed measured some steps twice: the last counts.
        series[name][step] = float(value)
  return {name: sorted(points.items()) for name, points in series.items()}


def draw(
  series: dict[str, list[tuple[int, float]]], pattern: str = r"/loss$"
) -> Figure:
  """One chart for each figure whose name the pattern is found in.

  Args:
    series: from `read`.
    pattern: a regular expression.

  Raises:
    ValueError: if it is found in no name; says which there are.
  """
  chosen = [name for name in series if re.search(pattern, name)]
  if not chosen:
    raise ValueError(
      f"no figure's name has {pattern!r} in it; there are: {sorted(series)}"
    )
  rows = math.ceil(len(chosen) / _COLUMNS)
  columns = min(len(chosen), _COLUMNS)
  figure = Figure(figsize=(3.2 * columns, 2.2 * rows), layout="constrained")
  for i, name in enumerate(chosen):
    axes = figure.add_subplot(rows, columns, i + 1)
    steps, values = zip(*series[name], strict=True)
    axes.plot(steps, values, marker="." if len(steps) < 10 else "")
    axes.set_title(name, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.set_xlabel("step", fontsize=7)
  return figure
