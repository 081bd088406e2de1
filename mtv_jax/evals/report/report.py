"""What a report shows, whatever its form: columns, radar chart, sheets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.report import radar, references, tables

# What stands for an evaluation in the chart; else its first metric does.
_HEADLINES = {
  "geometric_correspondence": ("avg_recall",),
  **dict.fromkeys(tables.DESCRIPTIONS, ()),
  "retrieval": ("text_to_image_r1", "image_to_text_r1"),
}


@dataclasses.dataclass(frozen=True)
class Sheet:
  """A picture of an evaluation.

  Attributes:
    evaluation: its name.
    encoder: which encoder's it is.
    name: of the picture.
    path: of its file, in the folder.
    picture: uint8 `[H, W, 3]`.
  """

  evaluation: str
  encoder: str
  name: str
  path: str
  picture: np.ndarray


@dataclasses.dataclass(frozen=True)
class Report:
  """What a report shows, whatever its form.

  Attributes:
    outcomes: of the encoders that were evaluated.
    columns: those, and earlier ones beside them.
    left_out: names of earlier ones of which no figure is on the same data.
    chart: the radar chart, or None.
    no_chart: why there is none.
    sheets: of all encoders.
    quoted: names of the columns of `references.COLUMNS` that are on the same
      data as one of the evaluations.
  """

  outcomes: Sequence[Outcome]
  columns: Sequence[Outcome]
  left_out: Sequence[str]
  chart: np.ndarray | None
  no_chart: str
  sheets: Sequence[Sheet]
  quoted: Sequence[str]


def build(
  outcomes: Sequence[Outcome],
  *,
  compared: Sequence[Outcome] = (),
  size: str | None = "base",
) -> Report:
  """Everything that a report shows.

  Args:
    outcomes: of the encoders that were evaluated.
    compared: earlier ones, shown beside them where the data are the same.
    size: of the published encoders in the chart, None for none.
  """
  columns = _distinct([*outcomes, *compared])
  rows = tables.rows(columns)
  used = [
    i < len(outcomes) or any(row.values[i] is not None for row in rows)
    for i in range(len(columns))
  ]
  left_out = [o.name for o, kept in zip(columns, used, strict=True) if not kept]
  columns = [o for o, kept in zip(columns, used, strict=True) if kept]
  shown = chart(columns, size=size)
  enough = len(shown.axes) >= 3
  return Report(
    outcomes=columns[: len(outcomes)],
    columns=columns,
    left_out=left_out,
    chart=radar.draw(shown.axes, shown.series) if enough else None,
    no_chart=""
    if enough
    else f"it takes 3 figures, and there are {len(shown.axes)}",
    sheets=_sheets(columns[: len(outcomes)]),
    quoted=shown.quoted if size else [],
  )


def _distinct(outcomes: Sequence[Outcome]) -> list[Outcome]:
  """Names that tell the columns apart: equal ones are numbered."""
  seen: dict[str, int] = {}
  named = []
  for outcome in outcomes:
    count = seen[outcome.name] = seen.get(outcome.name, 0) + 1
    name = outcome.name if count == 1 else f"{outcome.name} ({count})"
    named.append(dataclasses.replace(outcome, name=name))
  return named


@dataclasses.dataclass(frozen=True)
class Chart:
  """What the radar chart shows.

  Attributes:
    axes: a figure each.
    series: an encoder each, then chance.
    quoted: the columns of `references.COLUMNS` among the axes.
  """

  axes: list[radar.Axis]
  series: list[radar.Series]
  quoted: list[str]


def chart(columns: Sequence[Outcome], *, size: str | None) -> Chart:
  """The figures that stand for the evaluations, with the published ones.

  Args:
    columns: encoders, of different names.
    size: of the published ones, None for none.
  """
  published = [r for r in references.REFERENCES if r.size == size]
  axes, quoted = [], []
  values: dict[str, list[float | None]] = {o.name: [] for o in columns}
  values |= {r.name: [] for r in published} | {"chance": []}
  for row in _headlines(columns):
    column = references.column(
      row.evaluation, row.metric, _protocol(columns, row)
    )
    label = f"{row.evaluation}\n{row.metric}"
    here = dict(zip([o.name for o in columns], row.values, strict=True))
    if column:
      quoted.append(column)
      label = references.COLUMNS[column].label.replace(" ", "\n", 1)
      here |= {r.name: r.figures[column] for r in published}
    here["chance"] = row.chance
    known = list(here.values())
    axes.append(radar.axis(label, known, unit=row.unit, lower=row.lower))
    for name, kept in values.items():
      kept.append(here.get(name))
  styles = {r.name: "dashed" for r in published} | {"chance": "floor"}
  series = [
    radar.Series(name, tuple(kept), styles.get(name, "solid"))
    for name, kept in values.items()
    if any(v is not None for v in kept)
  ]
  return Chart(axes, series, quoted)


def _headlines(columns: Sequence[Outcome]) -> list[tables.Row]:
  """The rows that stand for their evaluations, of those that have a value."""
  by_evaluation: dict[str, list[tables.Row]] = {}
  for row in tables.rows(columns):
    by_evaluation.setdefault(row.evaluation, []).append(row)
  chosen = []
  for name, rows in by_evaluation.items():
    wanted = _HEADLINES.get(name, (rows[0].metric,))
    chosen += [row for row in rows if row.metric in wanted]
  return [row for row in chosen if any(v is not None for v in row.values)]


def _protocol(columns: Sequence[Outcome], row: tables.Row) -> dict:
  return next(
    o.results[row.evaluation].protocol
    for o in columns
    if row.evaluation in o.results
  )


def _sheets(outcomes: Sequence[Outcome]) -> list[Sheet]:
  sheets, taken = [], set()
  for evaluation in tables.evaluations(outcomes):
    for outcome in outcomes:
      result = outcome.results.get(evaluation)
      for name, picture in (result.pictures if result else {}).items():
        parts = [evaluation, name]
        if len(outcomes) > 1:
          parts.append(outcome.name)
        file = "_".join(map(_file_name, parts))
        # "a/b" and "a:b" are both "a-b" in a file's name.
        while file in taken:
          file += "-"
        taken.add(file)
        path = f"sheets/{file}.png"
        sheets.append(Sheet(evaluation, outcome.name, name, path, picture))
  return sheets


def _file_name(name: str) -> str:
  return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"
