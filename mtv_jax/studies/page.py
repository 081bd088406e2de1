"""Report of a study: arms, differences, synergy, scaling and runs."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtv_jax.perf.flops import build_all_objectives_spec
from mtv_jax.report import charts, evaluations, page, runs, tables
from mtv_jax.report.charts import Chart
from mtv_jax.report.contrasts import (
  MIN_SEEDS,
  ArmMeasurements,
  Comparison,
  Contrast,
  Metric,
)
from mtv_jax.report.run_folders import RunRecord, group_by_arm, read_facts
from mtv_jax.report.tables import (
  EMPTY,
  differences_table,
  format_difference,
  format_metric_value,
)
from mtv_jax.studies import scaling, statistics
from mtv_jax.studies.expand import Study, StudyRun
from mtv_jax.studies.statistics import StudyResults, Synergy
from mtv_jax.train.config import resolve
from mtv_jax.train.spec import abstract_params
from mtv_jax.utils.text import file_name, format_metric
from mtv_jax.utils.tree import flatten_with_names

ARMS_NOTE = (
  f"Means over seeds. With {MIN_SEEDS} or more seeds, brackets are 95 % "
  "intervals over seeds and items of the test set; with one seed, over items "
  "alone; with 2 to 4, none. ↓: lower is better. Chance is what random "
  "embeddings or guesses would give."
)
PROTOCOLS_NOTE = (
  "These evaluations measure the arms in different ways, or on different "
  "data: such arms are not compared."
)
_DIFFERENCES_NOTE = (
  "Differences in the metric's unit. Brackets are 95 % intervals, not "
  "corrected for their number. Only the family of tests has verdicts, "
  f"with {MIN_SEEDS} or more seeds of both arms: better or worse if p, "
  "corrected for the family (Holm 1979), is below 0.05, else not "
  "distinguishable. A verdict holds for other seeds and other test items of "
  "this config, not for other configs."
)
FEW_SEEDS_NOTE = (
  f"Some arms have fewer than {MIN_SEEDS} seeds. Such a table shows what these "
  "runs reached, but not whether a setting or the seed made the difference: "
  "with one seed, intervals cover the test items alone, and runs that differ "
  "only in the seed often differ by more. `mtv-jax study power` computes how "
  "many seeds an effect needs."
)
_SYNERGY_NOTE = (
  "Right of the diagonal: what a pair gains over the better of its two parts. "
  "Left of it: over the sum of both parts' distances from chance. Positive is "
  "an improvement, also where lower is better."
)
_RANKS_NOTE = (
  "Spearman's correlation over all runs, positive if runs with a higher rank "
  "are better. The runs of an arm are alike, so the correlation is mostly over "
  "arms."
)
_SCALING_NOTE = (
  "Dots are the arms' means with their intervals, dashed curves the fits. The "
  "fits' parameters have 95 % intervals from a bootstrap of the residuals."
)

_PREDICTIONS_NOTE = (
  "Predicted from smaller or shorter runs before the arm's first one "
  "(predictions.json), with 95 % intervals for one run. Metrics whose law was "
  "not identifiable have no prediction."
)


def write_study(
  folder: str | os.PathLike, output: str | os.PathLike | None = None
) -> list[pathlib.Path]:
  """Writes the report of a study's finished runs; returns both pages."""
  results = statistics.read_study(pathlib.Path(folder))
  output = pathlib.Path(folder if output is None else output)
  title = f"Study: {results.study.kind}"
  blocks = [
    *_describe_study(results, output),
    *_describe_predictions(results),
    *_describe_runs(results),
  ]
  return page.write_pages(title, blocks, output)[:2]


def _describe_study(
  results: StudyResults, output: pathlib.Path
) -> Iterator[page.PageBlock]:
  """The results of a study's finished runs."""
  study, data = results.study, results.measurements
  first_runs = _select_first_runs(results)
  facts = {run.name: read_facts(run, timed=False) for run in first_runs}
  facts = evaluations.merge_facts(facts)
  yield page.Table([facts[0], *_summarise(results), *facts[1:]])
  if first_runs:
    yield from runs.describe_samples(first_runs, output)
  main_metrics = results.main
  if not main_metrics:
    yield page.Note("No run is finished.")
    return
  tests, names = statistics.run_tests(results), list(data.values)
  pairs = [(name, study.baseline) for name in names if name != study.baseline]
  comparisons = statistics.compare(data, main_metrics, pairs, tests)
  rows = tables.list_arm_rows(data, main_metrics, comparisons)
  outcomes = {run.name: run.outcome for run in first_runs}
  outcomes = dict.fromkeys(data.values) | outcomes
  note, seeds = _DIFFERENCES_NOTE, group_by_arm(results.runs)
  if any(len(seeds.get(arm, ())) < MIN_SEEDS for arm in names):
    note = f"{FEW_SEEDS_NOTE} {note}"
  yield from evaluations.describe_headlines(rows, outcomes, note=note)
  yield from runs.describe_sheets(first_runs, output)
  yield page.Heading("Arms")
  yield page.Table(values_table(data, main_metrics), numbers=1)
  yield page.Note(f"{ARMS_NOTE} Pale dots are seeds.")
  if differing := describe_protocols(results):
    yield page.Note(PROTOCOLS_NOTE)
    yield page.Bullets(differing)
  yield page.Charts(draw_arms(data, main_metrics, comparisons))
  further = [metric for metric in results.metrics if metric not in main_metrics]
  if further:
    table = page.Table(values_table(data, further), numbers=1)
    yield page.Details("Further metrics", [table])
  if correlations := statistics.correlate_ranks(data, results.metrics):
    yield page.Heading("Feature ranks")
    yield page.Table(correlations_table(correlations), numbers=1)
    yield page.Note(_RANKS_NOTE)
  if study.kind == "scaling":
    yield from _describe_scaling(results)
    return
  sections = {f"Differences from {study.baseline}": pairs}
  if study.kind == "ladder" and len(names) > 2:
    steps = [(arm, before) for before, arm in itertools.pairwise(names)]
    sections["Differences from the arm before"] = steps
  shown_pairs = {pair for pairs in sections.values() for pair in pairs}
  further = [p for p in results.family.comparisons if p not in shown_pairs]
  sections |= {"Further tests": further} if further else {}
  for heading, pairs in sections.items():
    yield page.Heading(heading)
    rows = statistics.compare(data, main_metrics, pairs, tests)
    yield page.Table(differences_table(rows))
    yield tables.list_contrasts([(c.name, c) for c in rows])
  yield page.Bullets(_describe_family(results, tests))
  if study.kind == "pairs":
    yield from _describe_synergy(results, tests)


def _describe_family(
  results: StudyResults, tests: statistics.Tests
) -> list[str]:
  """Sentences on the tests of a study and when they were chosen."""
  family, study = results.family, results.study
  pairs = ", ".join(f"{arm} − {before}" for arm, before in family.comparisons)
  lines = [
    f"Tests: {pairs}, each on the main metrics of"
    f" {', '.join(family.evaluations)}; {family.test}."
  ]
  seeds = collections.Counter(run.arm for run in study.runs)
  if study.family is None:
    lines.append("They were not written down before the first run.")
  elif count := family.num_started_runs:
    lines.append(
      f"Written when the folder had {count} started runs. Unless these are"
      " another study's, or had not finished, their results may have been"
      " known."
    )
  else:
    lines.append("Written before the first run.")
  if study.family and dict(seeds) != dict(family.seeds):
    planned = ", ".join(f"{arm} {n}" for arm, n in family.seeds.items())
    lines.append(
      f"Planned seeds: {planned}; runs were added later. If they were added in"
      " view of results, false verdicts are more likely."
    )
  if pending := len(statistics.find_pending(results, tests)):
    lines.append(
      f"{pending} of them wait for runs; the correction counts them as well."
    )
  return lines


def _describe_runs(
  results: StudyResults,
) -> Iterator[page.PageBlock]:
  """Curves, gradients and configs of the finished runs."""
  if not results.runs:
    return
  first_runs = _select_first_runs(results)
  # Without times: the report must not depend on interruptions.
  yield from runs.describe_training(results.runs, timed=False)
  yield from runs.describe_gradients(results.runs)
  yield page.Heading("Runs")
  yield page.Table(runs.runs_table(results.runs, timed=False), numbers=1)
  yield from runs.describe_configs(first_runs)


def _select_first_runs(results: StudyResults) -> list[RunRecord]:
  """The first run of each arm, named as the arm."""
  arms = group_by_arm(results.runs).items()
  return [dataclasses.replace(runs[0], name=arm) for arm, runs in arms]


def _summarise(results: StudyResults) -> list[tuple[str, str]]:
  study = results.study
  seeds = collections.Counter(run.arm for run in study.runs)
  counts = ", ".join(f"{arm} {count}" for arm, count in seeds.items())
  flops = {run.arm: run.flops for run in study.runs if run.flops}
  finished = len(study.runs) - len(results.unfinished)
  common = study.match
  if study.budget != 1:
    common += f", at {study.budget:g} of the config's steps"
  lines = [("config", study.config), ("runs have in common", common)]
  if flops:
    costs = ", ".join(f"{arm} {f / 1e12:.3g}" for arm, f in flops.items())
    lines.append(("TFLOP of a run", costs))
  lines.append(("seeds", counts))
  lines.append(("finished", f"{finished} of {len(study.runs)} runs"))
  if results.unfinished:
    lines.append(("not finished", ", ".join(results.unfinished)))
  return [*lines, ("settings", study.fingerprint)]


def describe_protocols(results: StudyResults) -> list[str]:
  """Lists protocol differences between the first runs of the arms."""
  first_runs = {run.arm: run for run in reversed(results.runs)}
  outcomes = [
    dataclasses.replace(first_runs[arm].outcome, name=arm)
    for arm in results.measurements.values
    if arm in first_runs
  ]
  return [
    line
    for name in tables.evaluation_names(outcomes)
    for line in tables.list_differing(outcomes, name)
  ]


def values_table(
  data: ArmMeasurements, metrics: Sequence[Metric]
) -> list[list[str]]:
  """Means with intervals, and chance: a header, then a row per metric."""
  rows = [["metric", *data.values, "chance"]]
  for metric in metrics:
    arms = [statistics.summarise_arm(data, metric, arm) for arm in data.values]
    cells = (format_mean(arm, metric.unit) for arm in arms)
    rows.append([metric.label, *cells, format_chance(metric)])
  return rows


def format_mean(arm: charts.Row, unit: str) -> str:
  """An arm's mean in the displayed unit, with its interval if known."""
  if arm.value is None:
    return EMPTY
  format_cell = functools.partial(format_metric, unit=unit, digits=1)
  text = format_cell(arm.value)
  if arm.low is not None:
    text += f" [{format_cell(arm.low)}, {format_cell(arm.high)}]"
  return text


def format_chance(metric: Metric) -> str:
  """The chance level; empty if unknown."""
  chance = metric.chance
  return "" if chance is None else format_metric_value(chance, metric)


def correlations_table(
  correlations: Mapping[tuple[Metric, Metric], tuple[float, int]],
) -> list[list[str]]:
  """Correlations of each main metric (rows) with each rank (columns)."""
  metrics, ranks = map(dict.fromkeys, zip(*correlations, strict=True))
  rows = [["metric", *(rank.label for rank in ranks), "runs"]]
  for metric in metrics:
    cells = [correlations.get((metric, rank)) for rank in ranks]
    counts = {cell[1] for cell in cells if cell}
    values = [f"{cell[0]:+.2f}" if cell else EMPTY for cell in cells]
    rows.append([metric.label, *values, f"{max(counts)}"])
  return rows


def draw_arms(
  data: ArmMeasurements,
  metrics: Sequence[Metric],
  comparisons: Sequence[Comparison],
) -> list[Chart]:
  """A chart per metric: arms with intervals, seeds and chance."""
  by_key = {(c.metric, c.arm): c for c in comparisons}
  plots = []
  for metric in metrics:
    rows = []
    for colour, arm in enumerate(data.values):
      comparison = by_key.get((metric, arm))
      note = ""
      if comparison and comparison.difference is not None:
        note = f"{comparison.name}: {format_difference(comparison)}"
      row = statistics.summarise_arm(data, metric, arm)
      rows.append(row._replace(colour=colour, note=note))
    title, name = metric.name.replace("/", " "), file_name("arms", metric.name)
    options = dict(name=name, unit=metric.unit, lower=metric.lower)
    plots.append(charts.interval_plot(title, rows, **options))
  return plots


def _describe_synergy(
  results: StudyResults, tests: statistics.Tests
) -> Iterator[page.PageBlock]:
  data, metrics = results.measurements, results.main
  synergies = statistics.find_synergies(data, metrics, tests)
  yield page.Heading("Synergy")
  yield page.Note(_SYNERGY_NOTE)
  yield page.Charts(draw_synergies(synergies))
  yield tables.list_contrasts(synergy_rows(synergies))


def draw_synergies(synergies: Sequence[Synergy]) -> list[Chart]:
  """A matrix of gains per metric.

  Right of the diagonal: over the better part; left: over the sum of both.
  """
  groups: dict[Metric, list[Synergy]] = {}
  for synergy in synergies:
    groups.setdefault(synergy.over_better.metric, []).append(synergy)
  heat_maps = []
  for metric, rows in groups.items():
    names = list(dict.fromkeys(n for s in rows for n in (s.first, s.second)))
    values = [[None] * len(names) for _ in names]
    for s in rows:
      i, k = sorted((names.index(s.first), names.index(s.second)))
      for contrast, a, b in ((s.over_better, i, k), (s.over_additive, k, i)):
        if contrast is not None and contrast.gain is not None:
          values[a][b] = metric.scale * contrast.gain
    if any(v is not None for row in values for v in row):
      title = metric.label.removesuffix(" ↓")
      options = dict(rows=names, columns=names)
      name = file_name("synergy", metric.name)
      heat_maps.append(charts.heat_map(title, values, name=name, **options))
  return heat_maps


def synergy_rows(synergies: Sequence[Synergy]) -> list[tuple[str, Contrast]]:
  """Named contrasts for `tables.contrast_table`."""
  rows = []
  for s in synergies:
    rows.append((f"{s.arm} − {s.better}", s.over_better))
    if s.over_additive is not None:
      rows.append((f"{s.arm} − sum of both", s.over_additive))
  return rows


def _describe_scaling(results: StudyResults) -> Iterator[page.PageBlock]:
  sizes = measure_sizes(results.study)
  data, metrics = statistics.add_losses(results)
  fits = scaling.fit_metrics(data, metrics, sizes)
  yield page.Heading("Scaling")
  # Without limits, all arms draw from the same images; the number seen varies.
  is_limited = all(_parse_image_limit(run.arm) for run in results.study.runs)
  x_label = "distinct images" if is_limited else "images seen"
  yield page.Charts(scaling.draw_scaling(data, metrics, sizes, fits, x_label))
  yield page.Note(_SCALING_NOTE)
  yield page.Bullets(scaling.describe_laws(fits))
  yield page.Table(scaling.fits_table(fits), numbers=1)


def _describe_predictions(results: StudyResults) -> Iterator[page.PageBlock]:
  if results.predictions:
    yield page.Heading("Predictions")
    yield page.Note(_PREDICTIONS_NOTE)
    yield page.Table(predictions_table(results), numbers=2)


def predictions_table(results: StudyResults) -> list[list[str]]:
  """Predicted and measured values: a header, then rows by arm and metric."""
  data, metrics = statistics.add_losses(results)
  head = ["arm", "metric", "predicted", "measured", "inside", "written"]
  rows = [[*head, "exponents"]]
  for arm, entry in results.predictions.items():
    for metric in metrics:
      prediction = entry["metrics"].get(metric.name, {})
      if "value" not in prediction:
        continue
      format_cell = functools.partial(format_metric, unit=metric.unit, digits=1)
      value, low, high = (
        metric.scale * prediction[key] for key in ("value", "low", "high")
      )
      text = f"{format_cell(value)} [{format_cell(low)}, {format_cell(high)}]"
      values = data.read("values", metric, arm, data.seeds(arm, metric.name))
      measured = statistics.summarise_arm(data, metric, arm).value
      cells = [EMPTY, EMPTY]
      if measured is not None:  # The interval is for one run, not for the mean.
        inside = sum(low <= metric.scale * x <= high for x in values)
        cells = [format_cell(measured), f"{inside} of {len(values)} runs"]
      exponents = scaling.format_exponents(prediction["parameters"])
      rows.append([arm, metric.label, text, *cells, entry["date"], exponents])
  return rows


def measure_sizes(study: Study) -> dict[str, dict[str, Any]]:
  """`measure_size` of each arm of a scaling study."""
  first_runs = {run.arm: run for run in reversed(study.runs)}
  return {arm: measure_size(run) for arm, run in first_runs.items()}


def measure_size(run: StudyRun) -> dict[str, Any]:
  """Model, distinct images (or images seen) and parameters of a scaling arm."""
  return {
    "model": run.arm.rpartition("-")[0],
    "images": _parse_image_limit(run.arm) or run.images,
    "parameters": count_parameters(run.settings),
  }


def _parse_image_limit(arm: str) -> int | None:
  """Distinct images of a scaling study's arm; None without a limit."""
  images = arm.rpartition("-")[2]
  return int(images) if images.isdecimal() else None


def count_parameters(settings: Mapping[str, Any]) -> int:
  """Number of image-tower parameters of a resolved config."""
  spec = build_all_objectives_spec(resolve(settings))
  image = abstract_params(spec)["image"]
  return sum(math.prod(x.shape) for _, x in flatten_with_names(image))
