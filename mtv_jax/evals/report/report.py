"""Content of an evaluation report: columns, radar chart, sheets."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.report import radar, references, tables

# Metrics in the chart; of other evaluations the first one.
_HEADLINES = {
  "geometric_correspondence": ("avg_recall",),
  "retrieval": ("text_to_image_r1", "image_to_text_r1"),
  **dict.fromkeys(tables.DESCRIPTIVE, ()),
}


class Sheet(NamedTuple):
  """A uint8 image `[H, W, 3]` of an evaluation, with its file's `path`."""

  evaluation: str
  name: str
  title: str
  path: str
  image: np.ndarray


class Report(NamedTuple):
  """Content of a report in any format."""

  outcomes: Sequence[Outcome]  # one per evaluated encoder
  columns: Sequence[Outcome]  # those, and earlier ones to compare with
  left_out: Sequence[str]  # names of earlier ones without the same data
  chart: Sheet | None  # the radar chart of three metrics or more
  sheets: Sequence[Sheet]  # all encoders' sheets
  quoted: Sequence[str]  # columns of `references.COLUMNS` with the same data


def build_report(
  outcomes: Sequence[Outcome],
  *,
  compared: Sequence[Outcome] = (),
  size: str | None = "base",
) -> Report:
  """Collects the content of a report.

  Args:
    outcomes: one per evaluated encoder.
    compared: earlier outcomes, shown where the data are the same.
    size: model size of the charted published encoders; None for none.
  """
  columns = _number_equal_names([*outcomes, *compared])
  rows = tables.compare(columns)
  shown, left_out = columns[: len(outcomes)], []
  for i, outcome in enumerate(columns[len(outcomes) :], len(outcomes)):
    if any(row.values[i] is not None for row in rows):
      shown.append(outcome)
    else:
      left_out.append(outcome.name)
  chart, drawn = build_chart(shown, size=size), None
  if len(chart.axes) > 2:
    image = radar.draw(chart.axes, chart.series)
    drawn = Sheet("", "", "Radar chart", "radar.png", image)
  return Report(
    outcomes=shown[: len(outcomes)],
    columns=shown,
    left_out=left_out,
    chart=drawn,
    sheets=_list_sheets(shown[: len(outcomes)]),
    quoted=chart.quoted if size else [],
  )


def _number_equal_names(outcomes: Sequence[Outcome]) -> list[Outcome]:
  counts, renamed = collections.Counter(), []
  for outcome in outcomes:
    counts[outcome.name] += 1
    count = counts[outcome.name]
    name = outcome.name if count == 1 else f"{outcome.name} ({count})"
    renamed.append(dataclasses.replace(outcome, name=name))
  return renamed


class Chart(NamedTuple):
  """Content of the radar chart: metrics, encoders and chance."""

  axes: list[radar.Axis]
  series: list[radar.Series]
  quoted: list[str]  # columns of `references.COLUMNS` among the axes


def build_chart(columns: Sequence[Outcome], *, size: str | None) -> Chart:
  """The main metrics of distinctly named encoders beside the published ones."""
  published = [r for r in references.REFERENCES if r.size == size]
  axes, quoted, by_axis = [], [], []
  for row in tables.compare(columns):
    first = next(o for o in columns if row.evaluation in o.results)
    result = first.results[row.evaluation]
    headlines = _HEADLINES.get(row.evaluation, tuple(result.metrics)[:1])
    if row.metric not in headlines or row.values.count(None) == len(columns):
      continue
    values = dict(zip([o.name for o in columns], row.values, strict=True))
    label = f"{row.evaluation}\n{row.metric}"
    column = references.matching_column(
      row.evaluation, row.metric, result.protocol
    )
    if column:
      quoted.append(column)
      label = references.COLUMNS[column].label.replace(" ", "\n", 1)
      values |= {r.name: r.figures[column] for r in published}
    values["chance"] = row.chance
    by_axis.append(values)
    axes.append(
      radar.make_axis(label, [*values.values()], unit=row.unit, lower=row.lower)
    )
  styles = dict.fromkeys([o.name for o in columns], "solid")
  styles |= {r.name: "dashed" for r in published} | {"chance": "chance"}
  series = [
    radar.Series(name, tuple(values.get(name) for values in by_axis), style)
    for name, style in styles.items()
  ]
  series = [s for s in series if any(v is not None for v in s.values)]
  return Chart(axes, series, quoted)


def _list_sheets(outcomes: Sequence[Outcome]) -> list[Sheet]:
  sheets, files = [], set()
  for evaluation in tables.evaluation_names(outcomes):
    for outcome in outcomes:
      result = outcome.results.get(evaluation)
      for name, image in (result.sheets if result else {}).items():
        parts = [evaluation, name, outcome.name][: 2 + (len(outcomes) > 1)]
        parts = [re.sub(r"[^\w.-]+", "-", p).strip("-.") for p in parts]
        file = "_".join(part or "unnamed" for part in parts)
        # "a/b" and "a:b" both become "a-b".
        while file in files:
          file += "-"
        files.add(file)
        path = f"sheets/{file}.png"
        title = f"{name}, {outcome.name}"
        sheets.append(Sheet(evaluation, name, title, path, image))
  return sheets
