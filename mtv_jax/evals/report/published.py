"""Published figures of released checkpoints, beside results of them.

A figure stands beside a metric of an encoder that is said to be the checkpoint,
on the same whole data set, with its source and with what is known of its
protocol. Those of the SigLIP 2 table and of DINOv2's model card were compared
with their sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.report import references, tables
from mtv_jax.evals.report.tables import MetricRow
from mtv_jax.utils.pages import Block


class Figure(NamedTuple):
  """A published figure of a checkpoint."""

  value: float  # In percent or metres.
  source: str
  protocol: str  # in words
  # Entries of our protocol that a result by the published one has.
  entries: Mapping[str, Any]


class Match(NamedTuple):
  """A result and the figure that is published of its checkpoint."""

  encoder: int  # index of the outcome
  row: MetricRow
  column: str  # of `references.COLUMNS`
  figure: Figure


_UNKNOWN = "not published: its head, layers or input size"
_SQUASHED = (
  "big_vision's: squashed without antialiasing, in lower case and without "
  "punctuation"
)
_CLIP_VIEW = "open_clip's: shorter side resized, middle square"
_OWN = {"view": "encoder"}
_CANONICAL = {"view": "squash_center", "clean": "canonicalize"}
_TABLE_5 = "Table 5 of arXiv 2601.13886"
_SIGLIP_2 = "big_vision's README_siglip2.md"
_DINOV2 = "MODEL_CARD.md of facebookresearch/dinov2"
_DINOV2_README = "README.md of facebookresearch/dinov2"
_DINOV3 = "MODEL_CARD.md of facebookresearch/dinov3"


def _table_5(column: str, value: float, name: str) -> Figure:
  """A cell of `references.REFERENCES`, in the row `name`."""
  protocol, entries = _UNKNOWN, {}
  if column == "imagenet" or column.startswith("coco"):
    protocol, entries = "not published", {}
    if name.startswith("CLIP"):
      protocol, entries = f"{_CLIP_VIEW} (the figure is open_clip's)", _OWN
    elif name.startswith("SigLIP"):
      protocol, entries = f"presumably {_SQUASHED}", _big_vision(column)
  return Figure(value, _TABLE_5, protocol, entries)


def _big_vision(column: str) -> Mapping[str, Any]:
  return _CANONICAL if column == "imagenet" else {"view": "squash"}


def _siglip_2(*values: float) -> dict[str, Figure]:
  return {
    column: Figure(value, _SIGLIP_2, _SQUASHED, _big_vision(column))
    for column, value in zip(references.TABLE_5[:3], values, strict=True)
  }


def _dinov2(knn: float, linear: float, nyu: float, ade20k: float):
  figures = _dinov2_registers(knn, linear, source=_DINOV2)
  protocol = "four layers, a linear head (lin4)"
  figures["nyu"] = Figure(nyu, _DINOV2, protocol, {"protocol": "lin4"})
  protocol = "four layers, a linear head, several scales (+ms)"
  figures["ade20k"] = Figure(ade20k, _DINOV2, protocol, {})
  return figures


def _dinov2_registers(knn, linear, *, source=_DINOV2_README):
  center = {"view": "center"}
  k = "resized to 256, middle 224; k is not stated"
  heads = "12,500 steps of 1,024 random crops, the best of its heads"
  return {
    "knn": Figure(knn, source, k, center),
    "linear": Figure(linear, source, heads, center),
  }


def _dinov3(ade20k: float, nyu: float, navi: float, spair: float):
  probe = "a linear head on the last layer"
  match = "its averaging and input size are not stated there"
  return {
    "ade20k": Figure(ade20k, _DINOV3, probe, {}),
    "nyu": Figure(nyu, _DINOV3, probe, {"protocol": "linear"}),
    "navi": Figure(navi, _DINOV3, match, {}),
    "spair": Figure(spair, _DINOV3, match, {}),
  }


_BY_AUTHORS = {
  "google/siglip2-base-patch16-224": _siglip_2(78.2, 52.1, 68.9),
  "google/siglip2-base-patch16-256": _siglip_2(79.1, 53.2, 69.7),
  "google/siglip2-base-patch16-384": _siglip_2(80.6, 54.6, 71.4),
  "google/siglip2-base-patch16-512": _siglip_2(81.2, 55.2, 71.2),
  "google/siglip2-base-patch32-256": _siglip_2(74.0, 47.2, 63.7),
  "google/siglip2-large-patch16-256": _siglip_2(82.5, 54.7, 71.5),
  "google/siglip2-large-patch16-384": _siglip_2(83.1, 55.3, 71.4),
  "google/siglip2-large-patch16-512": _siglip_2(83.5, 55.2, 72.1),
  "google/siglip2-so400m-patch14-224": _siglip_2(83.2, 55.1, 71.5),
  "google/siglip2-so400m-patch14-384": _siglip_2(84.1, 55.8, 71.7),
  "google/siglip2-so400m-patch16-256": _siglip_2(83.4, 55.4, 71.5),
  "google/siglip2-so400m-patch16-384": _siglip_2(84.1, 56.0, 71.2),
  "google/siglip2-so400m-patch16-512": _siglip_2(84.3, 56.0, 71.3),
  "google/siglip2-giant-opt-patch16-256": _siglip_2(84.5, 55.7, 72.5),
  "google/siglip2-giant-opt-patch16-384": _siglip_2(85.0, 56.1, 72.8),
  "facebook/dinov2-small": _dinov2(79.0, 81.1, 0.417, 47.2),
  "facebook/dinov2-base": _dinov2(82.1, 84.5, 0.362, 51.3),
  "facebook/dinov2-large": _dinov2(83.5, 86.3, 0.333, 53.1),
  "facebook/dinov2-giant": _dinov2(83.5, 86.5, 0.298, 53.0),
  "facebook/dinov2-with-registers-small": _dinov2_registers(79.1, 80.9),
  "facebook/dinov2-with-registers-base": _dinov2_registers(82.0, 84.6),
  "facebook/dinov2-with-registers-large": _dinov2_registers(83.8, 86.7),
  "facebook/dinov2-with-registers-giant": _dinov2_registers(83.7, 87.1),
  "facebook/dinov3-vits16-pretrain-lvd1689m": _dinov3(47.0, 0.403, 56.3, 50.4),
  "facebook/dinov3-vitb16-pretrain-lvd1689m": _dinov3(51.8, 0.373, 58.8, 57.2),
  "facebook/dinov3-vitl16-pretrain-lvd1689m": _dinov3(54.9, 0.352, 62.3, 61.3),
}

# By the checkpoint's id on the Hugging Face hub and column.
FIGURES: dict[str, dict[str, Figure]] = {
  **{
    row.checkpoint: {
      column: _table_5(column, value, row.name)
      for column, value in row.figures.items()
    }
    | _BY_AUTHORS.get(row.checkpoint, {})
    for row in references.REFERENCES
  },
  **{
    checkpoint: figures
    for checkpoint, figures in _BY_AUTHORS.items()
    if checkpoint not in {row.checkpoint for row in references.REFERENCES}
  },
}


def find_matches(
  outcomes: Sequence[Outcome], rows: Sequence[MetricRow]
) -> list[Match]:
  """Figures that are published of the outcomes' checkpoints, by row."""
  matches = []
  for row in rows:
    for i, outcome in enumerate(outcomes):
      figures = FIGURES.get(outcome.checkpoint, {})
      if row.values[i] is None:
        continue
      protocol = outcome.results[row.evaluation].protocol
      column = references.matching_column(row.evaluation, row.metric, protocol)
      if column in figures:
        matches.append(Match(i, row, column, figures[column]))
  return matches


def describe_matches(
  outcomes: Sequence[Outcome], rows: Sequence[MetricRow]
) -> Iterator[Block]:
  """Figures beside results, their sources, and how the protocols differ."""
  if not any(outcome.checkpoint for outcome in outcomes):
    return
  matches = find_matches(outcomes, rows)
  yield Block("heading", "Published figures")
  lines = [
    f"{o.name} is compared with figures published for {o.checkpoint}."
    for o in outcomes
    if o.checkpoint
  ]
  if matches:
    yield Block("table", _table(outcomes, matches), {"numbers": 2})
  yield Block("bullets", [*lines, *_differences(outcomes, matches)])
  if other := [*_other_data(outcomes, matches)]:
    yield Block("note", "Published, but not on the data of this comparison:")
    yield Block("bullets", other)


def _table(
  outcomes: Sequence[Outcome], matches: Sequence[Match]
) -> list[list[str]]:
  lines = [["metric", "encoder", "here", "published", "difference"]]
  for match in matches:
    unit, value = match.row.unit, match.row.values[match.encoder]
    difference = tables.format_number(value - match.figure.value, unit)
    lines.append(
      [
        references.COLUMNS[match.column].label,
        outcomes[match.encoder].name,
        tables.format_value(value, unit, match.row.errors[match.encoder]),
        format_figure(match),
        difference.replace("-", "\u2212"),
      ]
    )
  return lines


def format_figure(match: Match) -> str:
  """The figure with its unit, with the digits of its source."""
  unit = match.row.unit
  digits = f"{match.figure.value:.1f}" if unit == "%" else ""
  return f"{digits or f'{match.figure.value:.3f}'} {unit}".strip()


def _differences(
  outcomes: Sequence[Outcome], matches: Sequence[Match]
) -> Iterator[str]:
  """A line for each figure: source, protocol, what differs here."""
  for match in matches:
    outcome, figure = outcomes[match.encoder], match.figure
    protocol = outcome.results[match.row.evaluation].protocol
    differing = [
      f"{key} is {tables.shorten(protocol[key])}, not {value}"
      for key, value in figure.entries.items()
      if protocol.get(key, value) != value
    ]
    here = f" Here {', '.join(differing)}." if differing else ""
    yield (
      f"{references.COLUMNS[match.column].label}, {outcome.name}: "
      f"{format_figure(match)} is of {figure.source}. "
      f"Its protocol: {figure.protocol}.{here}"
    )


def _other_data(
  outcomes: Sequence[Outcome], matches: Sequence[Match]
) -> Iterator[str]:
  """A line for each figure of an evaluation that is here on other data."""
  shown = {(match.encoder, match.column) for match in matches}
  for i, outcome in enumerate(outcomes):
    for name in FIGURES.get(outcome.checkpoint, {}):
      column = references.COLUMNS[name]
      result = outcome.results.get(column.evaluation)
      if result is not None and (i, name) not in shown:
        data = ", ".join(
          f"{key} {tables.shorten(result.protocol.get(key))}"
          for key in ("data", "images", "train_images")
          if key in result.protocol
        )
        yield f"{column.label}, {outcome.name}: here {data}."
