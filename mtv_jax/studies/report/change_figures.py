"""Charts and tables of the changes of evaluations since step 0."""

from __future__ import annotations

from collections.abc import Sequence

from mtv_jax.evals.report.report import file_name
from mtv_jax.studies.changes import Changes
from mtv_jax.studies.report.study_figures import (
  contrast_table,
  format_value,
  label,
  unit_scale,
)
from mtv_jax.utils import charts
from mtv_jax.utils.charts import Chart, Series


def draw_changes(
  changes: Sequence[Changes], colours: dict[str, int]
) -> list[Chart]:
  """A chart for each metric: the change over steps, with 95 % intervals."""
  metrics = {c.metric.name: c.metric for c in changes}
  return [
    _draw_metric(
      [c for c in changes if c.metric.name == name], colours, label(metric)
    )
    for name, metric in metrics.items()
  ]


def _draw_metric(
  changes: Sequence[Changes], colours: dict[str, int], title: str
) -> Chart:
  last = max(max(c.by_step) for c in changes)
  zero = Series("start", [(0, 0.0), (last, 0.0)], style="dashed")
  curves = []
  for change in changes:
    scale = unit_scale(change.metric)
    points = [(0, 0.0)]
    area = [(0, 0.0, 0.0)]
    for step, c in change.by_step.items():
      points.append((step, scale * c.difference))
      if c.item_low is not None:
        area.append((step, scale * c.item_low, scale * c.item_high))
    area = area if len(area) > 1 else []
    curves.append(Series(change.arm, points, colours[change.arm], area))
  name = file_name("change", changes[0].metric.name)
  title = f"Change of {title}"
  return charts.line_chart(title, [zero, *curves], name=name, x_label="step")


def changes_table(changes: Sequence[Changes]) -> list[list[str]]:
  """The start, and the worst, best and last change: a header, then rows."""
  rows = [
    ["metric", "run", "start", "worst", "best", "last", "below the start"]
  ]
  for change in changes:
    below = change.num_below_start
    rows.append(
      [
        label(change.metric),
        change.arm,
        format_value(change.start, change.metric),
        *(
          _format_change(change, step)
          for step in (change.worst_step, change.best_step, max(change.by_step))
        ),
        "–" if below is None else f"{below} of {len(change.by_step)}",
      ]
    )
  return rows


def _format_change(change: Changes, step: int) -> str:
  c = change.by_step[step]
  ends = [] if c.item_low is None else [c.item_low, c.item_high]
  value, *ends = (
    format_value(v, change.metric, signed=True) for v in (c.difference, *ends)
  )
  interval = f" [{', '.join(ends)}]" if ends else ""
  return f"{value}{interval}\nat step {step:,}"


def list_changes(changes: Sequence[Changes]) -> list[list[str]]:
  """Every change with its intervals."""
  rows = [
    (f"{change.arm}, step {step:,}", change.metric, contrast)
    for change in changes
    for step, contrast in change.by_step.items()
  ]
  # Columns of the corrected p value and of the verdict that it gives.
  return [row[:6] + row[7:9] + row[10:] for row in contrast_table(rows)]
