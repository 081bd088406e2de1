"""Sections of a study's report: arms, differences, synergy, scaling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mtv_jax.evals.report import tables
from mtv_jax.perf.flops import build_long_step_spec
from mtv_jax.studies import statistics
from mtv_jax.studies.contrasts import Contrast, Metric
from mtv_jax.studies.expand import Run
from mtv_jax.studies.report import study_figures
from mtv_jax.studies.results import StudyResults
from mtv_jax.train.spec import abstract_params
from mtv_jax.utils.pages import Block
from mtv_jax.utils.tree import flatten_with_names

_ARMS_NOTE = (
  "Means over seeds with 95 % t intervals over seeds, or with one seed 1.96 "
  "standard errors over the items of the test set. Pale dots are seeds. ↓: "
  "lower is better. Chance is what random embeddings or guesses would give."
)
_PROTOCOLS_NOTE = (
  "These evaluations measure the arms in different ways, or on different data: "
  "their differences are not those of the encoders alone."
)
_DIFFERENCES_NOTE = (
  "Differences in the metric's unit, paired by seed where there are 2 or more, "
  "with 95 % intervals over seeds; with one seed, over items. A difference is "
  "better or worse if its p value, corrected for all comparisons of the table "
  "(Holm 1979), is below 0.05 and the second interval, over items (and seeds, "
  "if several), excludes 0. Else it is not distinguishable."
)
_SYNERGY_NOTE = (
  "Right of the diagonal: what a pair gains over the better of its two parts. "
  "Left of it: over the sum of both parts' distances from chance. Positive is "
  "an improvement, also where lower is better. Bold: distinguishable."
)
_SCALING_NOTE = (
  "Dots are means with the intervals of the arms, dashed curves the fits. "
  "Intervals of the fits' parameters are of a bootstrap of residuals, 95 %."
)


def describe_study(results: StudyResults) -> Iterator[Block]:
  """What the study says, from its finished runs."""
  study, data = results.study, results.measurements
  yield Block("bullets", _summarise(results))
  main = study_figures.select_main(results.metrics)
  if not main:
    yield Block("note", "No run is finished.")
    return
  compared = statistics.compare(data, main, baseline=study.baseline)
  yield Block("heading", "Arms")
  table = study_figures.values_table(data, main)
  yield Block("table", table, {"numbers": 1})
  yield Block("note", _ARMS_NOTE)
  if differences := _describe_protocols(results):
    yield Block("note", _PROTOCOLS_NOTE)
    yield Block("bullets", differences)
  yield Block("charts", study_figures.draw_arms(data, main, compared))
  further = [metric for metric in results.metrics if metric not in main]
  if further:
    table = study_figures.values_table(data, further)
    inner = (Block("table", table, {"numbers": 1}),)
    yield Block("details", "Further metrics", inner=inner)
  if study.kind == "scaling":
    yield from _describe_scaling(results, main)
    return
  yield Block("heading", f"Differences from {study.baseline}")
  yield from _describe_differences(compared, main)
  yield Block("note", _DIFFERENCES_NOTE)
  if study.kind == "ladder" and len(data.values) > 2:
    yield Block("heading", "Differences from the arm before")
    steps = study_figures.compare_in_order(data, main)
    yield from _describe_differences(steps, main)
  if study.kind == "pairs":
    yield from _describe_synergy(results, main)


def _summarise(results: StudyResults) -> list[str]:
  study = results.study
  seeds: dict[str, int] = {}
  for run in study.runs:
    seeds[run.arm] = seeds.get(run.arm, 0) + 1
  counts = ", ".join(f"{arm} {count}" for arm, count in seeds.items())
  flops = {run.arm: run.flops for run in study.runs if run.flops}
  finished = len(study.runs) - len(results.unfinished)
  lines = [
    f"Config: {study.config}",
    f"Runs have in common: {study.match}"
    + (f", at {study.budget:g} of the config's steps" * (study.budget != 1)),
    f"Seeds: {counts}",
    f"Finished: {finished} of {len(study.runs)} runs",
    f"Settings: {study.fingerprint}",
  ]
  if flops:
    costs = ", ".join(f"{arm} {f / 1e12:.3g}" for arm, f in flops.items())
    lines.insert(2, f"TFLOP of a run: {costs}")
  if results.unfinished:
    lines.insert(-1, f"Not finished: {', '.join(results.unfinished)}")
  return lines


def _describe_protocols(results: StudyResults) -> list[str]:
  """What differs between arms in how they are evaluated, by their first run."""
  first = {run.arm: run for run in reversed(results.runs)}
  outcomes = [
    dataclasses.replace(first[arm].outcome, name=arm)
    for arm in results.measurements.values
    if arm in first
  ]
  return [
    line
    for name in tables.evaluation_names(outcomes)
    for line in tables.describe_differences(outcomes, name)
  ]


def _describe_differences(
  compared: Sequence[statistics.Comparison], metrics: Sequence[Metric]
) -> Iterator[Block]:
  yield Block("table", study_figures.differences_table(compared, metrics))
  by_name = {metric.name: metric for metric in metrics}
  rows = [(f"{c.arm} − {c.baseline}", by_name[c.metric], c) for c in compared]
  yield _details(rows)


def _details(rows: Sequence[tuple[str, Metric, Contrast]]) -> Block:
  inner = (Block("table", study_figures.contrast_table(rows)),)
  return Block("details", "Intervals and p values", inner=inner)


def _describe_synergy(
  results: StudyResults, metrics: Sequence[Metric]
) -> Iterator[Block]:
  synergies = statistics.find_synergies(results.measurements, metrics)
  yield Block("heading", "Synergy")
  yield Block("note", _SYNERGY_NOTE)
  yield Block("charts", study_figures.draw_synergies(synergies, metrics))
  yield _details(study_figures.synergy_rows(synergies, metrics))


def _describe_scaling(
  results: StudyResults, metrics: Sequence[Metric]
) -> Iterator[Block]:
  first = {run.arm: run for run in reversed(results.study.runs)}
  sizes = {arm: measure_size(run) for arm, run in first.items()}
  data = results.measurements
  variables = {
    arm: {k: v for k, v in size.items() if k != "model"}
    for arm, size in sizes.items()
  }
  fits = study_figures.fit_metrics(data, metrics, variables)
  yield Block("heading", "Scaling")
  # Without limits all arms have the data's images, and may see more or fewer.
  limited = all(count_distinct(run.arm) for run in results.study.runs)
  x_label = "distinct images" if limited else "images seen"
  drawn = study_figures.draw_scaling(data, metrics, sizes, fits, x_label)
  yield Block("charts", drawn)
  yield Block("note", _SCALING_NOTE)
  yield Block("bullets", study_figures.describe_laws(fits))
  yield Block("table", study_figures.fits_table(fits), {"numbers": 1})


def measure_size(run: Run) -> dict[str, Any]:
  """Model, images and parameters of an arm of a scaling study.

  The images are distinct ones where the study limits them, else those seen. The
  parameters are those of the image tower.
  """
  return {
    "model": run.arm.rpartition("-")[0],
    "images": count_distinct(run.arm) or run.images,
    "parameters": count_parameters(run.settings),
  }


def count_distinct(arm: str) -> int | None:
  """Distinct images of an arm of a scaling study; None without a limit."""
  images = arm.rpartition("-")[2]
  return int(images) if images.isdecimal() else None


def count_parameters(settings: Mapping[str, Any]) -> int:
  """Parameters of the image tower of a resolved config."""
  spec = build_long_step_spec(ConfigDict(dict(settings)))
  image = abstract_params(spec)["image"]
  return sum(math.prod(x.shape) for _, x in flatten_with_names(image))
