"""Curves of a run's metrics over its steps."""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import re
from typing import Any

from matplotlib.figure import Figure

from mtv_jax.utils.errors import InputError, MissingFileError

_COLUMNS = 3


def read_metrics(run: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
  """(step, value) pairs of each metric in a run's `metrics.jsonl`.

  Values that are not finite are left out.

  Raises:
    MissingFileError: if the run has no such file yet.
    InputError: for a file of another kind.
  """
  path = pathlib.Path(run) / "metrics.jsonl"
  if not path.is_file():
    raise MissingFileError(
      f"{path} does not exist: {run} is not the folder of a run, or the run "
      "has logged nothing yet."
    )
  series = collections.defaultdict(dict)
  for row in read_rows(path):
    step = row.pop("step")
    for name, value in row.items():
      if isinstance(value, int | float) and math.isfinite(value):
        # A resumed run logs some steps twice: the last value counts.
        series[name][step] = float(value)
  return {name: sorted(points.items()) for name, points in series.items()}


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of a run's JSON Lines, without a last one that a crash truncated.

  Raises:
    InputError: another line is not a row with a `step`.
  """
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  rows = []
  for i, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
    except ValueError:
      is_row = False
    if is_row:
      rows.append(row)
    elif i < len(lines):
      raise InputError(
        f"{path}: line {i} is not a row of a run's log: {line[:60]!r}. Remove "
        "the line."
      )
  return rows


def plot_metrics(
  series: dict[str, list[tuple[int, float]]], pattern: str = r"/loss$"
) -> Figure:
  """One chart for each metric of `read_metrics` whose name matches a regex.

  Raises:
    InputError: if no name matches; lists the names.
  """
  names = [name for name in series if re.search(pattern, name)]
  if not names:
    raise InputError(
      f"no metric matches {pattern!r}; expected {sorted(series)}"
    )
  columns = min(len(names), _COLUMNS)
  rows = math.ceil(len(names) / columns)
  figure = Figure(figsize=(3.2 * columns, 2.2 * rows), layout="constrained")
  for i, name in enumerate(names):
    axes = figure.add_subplot(rows, columns, i + 1)
    steps, values = zip(*series[name], strict=True)
    axes.plot(steps, values, marker="." if len(steps) < 10 else "")
    axes.set_title(name, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.set_xlabel("step", fontsize=7)
  return figure
