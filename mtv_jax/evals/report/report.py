"""Content of an evaluation report: columns, radar chart, sheets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.report import radar, references, tables

# Metrics in the chart; of other evaluations the first one.
_HEADLINES = {
  "geometric_correspondence": ("avg_recall",),
  "retrieval": ("text_to_image_r1", "image_to_text_r1"),
  **dict.fromkeys(tables.DESCRIPTIVE, ()),
}


@dataclasses.dataclass(frozen=True)
class Sheet:
  """A named uint8 image `[H, W, 3]` of an evaluation of an encoder.

  `path` is that of its file, in the folder of the report.
  """

  evaluation: str
  encoder: str
  name: str
  path: str
  image: np.ndarray

  @property
  def title(self) -> str:
    return f"{self.name}, {self.encoder}"


@dataclasses.dataclass(frozen=True)
class Report:
  """Content of a report in any format.

  Attributes:
    outcomes: of the encoders that were evaluated.
    columns: those, and earlier ones to compare with.
    left_out: names of earlier ones without a result on the same data.
    chart: the radar chart; None for fewer than three metrics.
    sheets: of all encoders.
    quoted: columns of `references.COLUMNS` with the data of an evaluation.
  """

  outcomes: Sequence[Outcome]
  columns: Sequence[Outcome]
  left_out: Sequence[str]
  chart: np.ndarray | None
  sheets: Sequence[Sheet]
  quoted: Sequence[str]


def build_report(
  outcomes: Sequence[Outcome],
  *,
  compared: Sequence[Outcome] = (),
  size: str | None = "base",
) -> Report:
  """Collects the content of a report.

  Args:
    outcomes: of the encoders that were evaluated.
    compared: earlier ones, shown where the data are the same.
    size: of the published encoders in the chart, None for none.
  """
  columns = _number_equal_names([*outcomes, *compared])
  rows = tables.compare(columns)
  shown, left_out = columns[: len(outcomes)], []
  for i, outcome in enumerate(columns[len(outcomes) :], len(outcomes)):
    if any(row.values[i] is not None for row in rows):
      shown.append(outcome)
    else:
      left_out.append(outcome.name)
  chart = build_chart(shown, size=size)
  return Report(
    outcomes=shown[: len(outcomes)],
    columns=shown,
    left_out=left_out,
    chart=radar.draw(chart.axes, chart.series) if len(chart.axes) > 2 else None,
    sheets=_list_sheets(shown[: len(outcomes)]),
    quoted=chart.quoted if size else [],
  )


def _number_equal_names(outcomes: Sequence[Outcome]) -> list[Outcome]:
  counts: dict[str, int] = {}
  renamed = []
  for outcome in outcomes:
    count = counts[outcome.name] = counts.get(outcome.name, 0) + 1
    name = outcome.name if count == 1 else f"{outcome.name} ({count})"
    renamed.append(dataclasses.replace(outcome, name=name))
  return renamed


@dataclasses.dataclass(frozen=True)
class Chart:
  """Content of the radar chart: metrics, encoders and chance.

  `quoted` are the columns of `references.COLUMNS` among the axes.
  """

  axes: list[radar.Axis]
  series: list[radar.Series]
  quoted: list[str]


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
      for name, image in (result.pictures if result else {}).items():
        parts = [evaluation, name, outcome.name][: 2 + (len(outcomes) > 1)]
        parts = [re.sub(r"[^\w.-]+", "-", p).strip("-.") for p in parts]
        file = "_".join(part or "unnamed" for part in parts)
        # "a/b" and "a:b" both become "a-b".
        while file in files:
          file += "-"
        files.add(file)
        path = f"sheets/{file}.png"
        sheets.append(Sheet(evaluation, outcome.name, name, path, image))
  return sheets
