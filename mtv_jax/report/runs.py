"""Reports of runs: curves, metrics, gradients, image grids, configs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from mtv_jax.config.overrides import ABSENT, list_differences
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.encoder_requests import distinct_names
from mtv_jax.report import charts, evaluations, interference, page, tables
from mtv_jax.report.charts import Chart, Series
from mtv_jax.report.contrasts import (
  Contrast,
  Metric,
  collect_measurements,
  estimate_contrast,
  list_metrics,
  protocol_key,
)
from mtv_jax.report.run_folders import (
  SAMPLES,
  RunRecord,
  group_by_arm,
  list_evaluations,
  name_arms,
  read_facts,
  read_image,
  read_outcomes,
  read_run,
)
from mtv_jax.utils import plots
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.text import file_name, format_setting

_CURVES_NOTE = (
  "With more than 160 logged steps, neighbours are averaged. A curve of "
  "several seeds is their mean, in a band from the minimum to the maximum."
)
_RUNS_NOTE = (
  "Each column is one run. A difference between two runs may come from the "
  "config or from the seed, and holds for these encoders only. "
  "`mtv-jax study` compares settings over several seeds each."
)
_GRADIENTS_NOTE = (
  "Means over the measurements of a run, each of one noisy batch, "
  "without blocks that lack a gradient. Where the cosine is negative, a step "
  "along one gradient raises the other loss on this batch, to first order. "
  "Gradients of independent noise have a negative cosine in half of the pairs; "
  "`mtv-jax interference` separates the expected gradients from the noise. In "
  "the fall of losses, rows are the objectives whose gradient is followed."
)
_SAMPLES_NOTE = (
  "Rows of the first batch, as the model reads them. Depth: red is near, blue "
  "far, striped unlabelled."
)
_CHANGES_NOTE = (
  "Main metrics that were evaluated before the first step, on the same items. "
  "Intervals are 95 % over the items, for these runs: another seed may change "
  "differently. The last column counts evaluations whose whole interval is "
  "worse than the start, uncorrected for the number of evaluations."
)
_MAX_WIDTH = 1200  # Width of an image on the page, in pixels.
# Metrics drawn after the evaluations' metrics.
_FURTHER_METRICS = r"grad_norm$|/weight$|^interference/"
_SPEED_METRICS = ("speed/images_per_second", "speed/wait")
_MAX_NAMES = 4  # Maximum number of runs named in the title.
_MAX_CHARACTERS = 160  # Maximum characters of a config value.


def write_runs(
  runs: Sequence[str | os.PathLike],
  output: str | os.PathLike,
  *,
  names: str | None = None,
) -> list[pathlib.Path]:
  """Writes the report of one run, or of several overlaid; returns both pages.

  `names` is a regular expression for extra logged metrics to draw.
  """
  paths = [str(pathlib.Path(run)) for run in runs]
  if len({*map(os.path.realpath, paths)}) < len(paths):
    raise ConfigError(f"a run is given twice: {', '.join(paths)}")
  paths = [os.path.realpath(path) for path in paths]
  for path in paths:
    if os.path.exists(os.path.join(path, "study.json")):
      raise ConfigError(
        f"{path} is a study. Pass it alone, or its runs: {path}/runs/*"
      )
  titles = distinct_names(paths)
  records = [read_run(p, name=n) for p, n in zip(paths, titles, strict=True)]
  records = name_arms(records)
  title = ("Run " if len(records) == 1 else "Runs ") + ", ".join(titles)
  if len(records) > _MAX_NAMES:
    title = f"{len(records)} runs"
  output = pathlib.Path(output)
  rows = tables.compare([run.outcome for run in records], ranked=False)
  blocks = [page.Table(runs_table(records), numbers=1)] * (len(records) > 1)
  facts = {run.name: read_facts(run) for run in records}
  blocks.append(page.Table(evaluations.merge_facts(facts)))
  blocks += describe_samples(records, output)
  changes = measure_changes(records) if len(records) == 1 else []
  changes = {c.metric.name: c.by_step[max(c.by_step)] for c in changes}
  outcomes = {run.name: run.outcome for run in records}
  blocks += evaluations.describe_headlines(rows, outcomes, changes)
  if len(records) > 1:
    blocks.append(page.Note(_RUNS_NOTE))
  blocks += describe_sheets(records, output)
  blocks += describe_training(records, names=names)
  blocks += describe_changes(records)
  blocks += describe_gradients(records)
  blocks += _describe_metrics(records, rows)
  blocks += describe_configs(records)
  return page.write_pages(title, blocks, output)[:2]


def format_run(folder: str | os.PathLike) -> str:
  """A text table of a run's last metrics with chance; "" if none."""
  outcome = read_run(folder).outcome
  return tables.format_metrics([outcome]) if outcome.results else ""


def _describe_metrics(
  runs: Sequence[RunRecord], rows: Sequence[tables.MetricRow]
) -> Iterator[page.PageBlock]:
  """All metrics, collapsed; for several runs, charts of the main ones."""
  if not rows:
    return
  yield page.Heading("Metrics")
  yield tables.fold_metrics([run.outcome for run in runs], rows)
  if len(runs) > 1:
    names = {i: run.name for i, run in enumerate(runs)}
    metric_charts = [
      evaluations.draw_metric(row, names)
      for row in rows
      if row.is_main and any(v is not None for v in row.values)
    ]
    yield page.Charts(metric_charts)
    yield page.Note("Bars are 1.96 standard errors to both sides.")


def describe_training(
  runs: Sequence[RunRecord], *, timed: bool = True, names: str | None = None
) -> Iterator[page.PageBlock]:
  """Training curves with the arms overlaid; includes speed if `timed`."""
  curves, further = draw_training_curves(runs, timed=timed, names=names)
  if not curves and not further:
    return
  yield page.Heading("Training")
  yield page.Note(_CURVES_NOTE)
  yield page.Charts(curves)
  if further:
    title = "Further metrics, gradient norms, weights, speed"
    yield page.Details(title, [page.Charts(further)])


def draw_training_curves(
  runs: Sequence[RunRecord], *, timed: bool = True, names: str | None = None
) -> tuple[list[Chart], list[Chart]]:
  """Losses and main metrics over steps by arm, then further metrics.

  Several seeds are drawn as their mean with a min-max band. The total loss is
  skipped if objectives differ. Metrics that match `names` count as main.
  """
  logged = dict.fromkeys(name for run in runs for name in run.series)
  objectives = {
    tuple(sorted(run.config.get("objectives") or ())) for run in runs
  }
  losses = [n for n in logged if n.endswith("/loss")]
  if len(objectives) == 1 and len(losses) != 1:
    losses = [n for n in logged if n == "loss"] + losses
  metrics = list_metrics(
    item for run in runs for item in run.outcome.results.items()
  )
  main_names = {metric.name for metric in tables.select_main(metrics)}
  metrics = {metric.name: metric for metric in metrics}
  main = losses + [n for n in logged if n in main_names]
  requested = _find_names(logged, names) if names is not None else []
  main += requested
  further = [n for n in logged if n in metrics and n not in main_names]
  further += [n for n in logged if re.search(_FURTHER_METRICS, n)]
  further += [n for n in logged if timed and n in _SPEED_METRICS]
  main = dict.fromkeys(main)
  further = [n for n in dict.fromkeys(further) if n not in main]
  main_charts = [
    _draw_curve(runs, name, metrics.get(name), least=2 - (name in requested))
    for name in main
  ]
  others = [_draw_curve(runs, name, metrics.get(name)) for name in further]
  return [c for c in main_charts if c], [c for c in others if c]


def _find_names(logged: Collection[str], pattern: str) -> list[str]:
  """The metrics that match a regular expression; InputError if none does."""
  try:
    matches = [name for name in logged if re.search(pattern, name)]
  except (re.error, RecursionError) as error:
    raise InputError(
      f"--names={pattern!r} is not a regular expression: {error}."
    ) from None
  if not matches:
    raise InputError(
      f"--names={pattern!r} matches no metric of {sorted(logged)}."
    )
  return matches


def _draw_curve(
  runs: Sequence[RunRecord],
  name: str,
  metric: Metric | None,
  *,
  least: int = 2,
) -> Chart | None:
  """One metric over steps; None if every curve has under `least` points."""
  curves, values = [], []
  metric = metric or Metric(name, unit="")  # Losses and speeds.
  unit, chance, factor = metric.unit, metric.chance, metric.scale
  for colour, (arm, members) in enumerate(group_by_arm(runs).items()):
    seeds = [dict(run.series.get(name, ())) for run in members]
    seeds = [seed for seed in seeds if seed]
    if not seeds:
      continue
    steps = sorted(set.intersection(*map(set, seeds)))
    table = np.array(
      [[factor * seed[s] for s in steps] for seed in seeds], float
    )
    mean, low, high = (
      charts.thin_out([*zip(steps, line.tolist(), strict=True)])
      for line in (table.mean(0), table.min(0), table.max(0))
    )
    area = []
    if len(seeds) > 1:
      area = [(x, a, b) for (x, a), (_, b) in zip(low, high, strict=True)]
    curves.append(Series(arm, mean, colour, area))
    values += [y for _, y in mean]
  if not any(len(curve.points) >= least for curve in curves):
    return None
  is_positive = min(values) > 0
  return charts.line_chart(
    f"{name} ({unit})" if unit else name,
    curves,
    name=file_name("curve", name),
    x_label="step",
    log_y=is_positive and max(values) > 30 * min(values),
    chance=chance and factor * chance,
  )


@dataclasses.dataclass(frozen=True)
class Changes:
  """An arm's metric at later steps, minus its value at step 0."""

  arm: str
  metric: Metric
  start: float  # mean over seeds
  # In step order; only steps after 0 that all seeds have evaluated.
  by_step: dict[int, Contrast]

  @property
  def worst_step(self) -> int:
    """The step with the lowest gain."""
    return min(self.by_step, key=lambda step: self.by_step[step].gain)

  @property
  def best_step(self) -> int:
    """The step with the highest gain."""
    return max(self.by_step, key=lambda step: self.by_step[step].gain)

  @property
  def num_below_start(self) -> int | None:
    """Evaluations whose whole interval is worse; None if unknown."""
    if any(c.low is None for c in self.by_step.values()):
      return None
    if self.metric.lower:
      return sum(c.low > 0 for c in self.by_step.values())
    return sum(c.high < 0 for c in self.by_step.values())


def describe_changes(runs: Sequence[RunRecord]) -> Iterator[page.PageBlock]:
  """Changes of evaluations since step 0; empty without such evaluations."""
  arms = group_by_arm(runs)
  changes = [c for arm in arms.values() for c in measure_changes(arm)]
  if not changes:
    return
  names = [*dict.fromkeys(c.metric.name for c in changes)]
  changes.sort(key=lambda change: names.index(change.metric.name))
  yield page.Heading("Changes since the start")
  yield page.Table(_changes_table(changes), numbers=2)
  yield page.Note(_CHANGES_NOTE)
  colours = {arm: i for i, arm in enumerate(arms)}
  by_metric = [[c for c in changes if c.metric.name == name] for name in names]
  yield page.Charts([_draw_change(group, colours) for group in by_metric])
  rows = [
    (f"{change.arm}, step {step:,}", contrast)
    for change in changes
    for step, contrast in change.by_step.items()
  ]
  table = page.Table(
    tables.contrast_table(rows, ("p Holm", "verdict")), numbers=2
  )
  yield page.Details("Every evaluation", [table])


def measure_changes(runs: Sequence[RunRecord]) -> list[Changes]:
  """Changes of main metrics that all of an arm's seeds evaluated at step 0.

  Skips steps with a different protocol or without a finite value of a seed.
  """
  files = {run.seed: list_evaluations(run.folder) for run in runs}
  changes = []
  for name, steps in next(iter(files.values())).items():
    by_step = {
      step: {
        seed: _read_result(files[seed][name][step], name) for seed in files
      }
      for step in steps
      if all(step in seed.get(name, {}) for seed in files.values())
    }
    if 0 not in by_step:
      continue
    start = next(iter(by_step[0].values()))
    data = collect_measurements(
      {
        str(step): {seed: {name: result} for seed, result in seeds.items()}
        for step, seeds in by_step.items()
        if {*map(protocol_key, seeds.values())} == {protocol_key(start)}
      },
      fixed=True,
    )
    for metric in tables.select_main(list_metrics([(name, start)])):
      complete_steps = [
        step
        for step in data.values
        if len(data.seeds(step, metric.name)) == len(files)
      ]
      if complete_steps[:1] == ["0"] and len(complete_steps) > 1:
        values = data.read("values", metric, "0", [*files])
        contrasts = {
          int(step): estimate_contrast(data, metric, {step: 1.0, "0": -1.0})
          for step in complete_steps[1:]
        }
        mean = sum(values) / len(values)
        changes.append(Changes(runs[0].arm, metric, mean, contrasts))
  return changes


def _read_result(path: pathlib.Path, name: str) -> Result:
  for outcome in read_outcomes(path):
    if name in outcome.results:
      return outcome.results[name]
  raise InputError(f"{path} lacks results of {name!r}.")


def _draw_change(changes: Sequence[Changes], colours: dict[str, int]) -> Chart:
  """The change of a metric over steps, with 95 % intervals."""
  metric = changes[0].metric
  last_step = max(max(c.by_step) for c in changes)
  curves = [Series("start", [(0, 0.0), (last_step, 0.0)], style="dashed")]
  for change in changes:
    points, area = [(0, 0.0)], [(0, 0.0, 0.0)]
    for step, c in change.by_step.items():
      points.append((step, metric.scale * c.difference))
      if c.low is not None:
        ends = metric.scale * c.low, metric.scale * c.high
        area.append((step, *ends))
    area = area if len(area) > 1 else []
    curves.append(Series(change.arm, points, colours[change.arm], area))
  name = file_name("change", metric.name)
  title = f"Change of {metric.label}"
  return charts.line_chart(title, curves, name=name, x_label="step")


def _changes_table(changes: Sequence[Changes]) -> list[list[str]]:
  """Start, and worst, best and last change: a header, then rows."""
  header = ["metric", "run", "start", "worst", "best", "last"]
  rows = [[*header, "below the start"]]
  for change in changes:
    start = tables.format_metric_value(change.start, change.metric)
    rows.append([change.metric.label, change.arm, start])
    for step in (change.worst_step, change.best_step, max(change.by_step)):
      text = tables.format_difference(change.by_step[step])
      rows[-1].append(f"{text}\nat step {step:,}")
    num_below, count = change.num_below_start, len(change.by_step)
    rows[-1].append(
      tables.EMPTY if num_below is None else f"{num_below} of {count}"
    )
  return rows


def describe_gradients(runs: Sequence[RunRecord]) -> Iterator[page.PageBlock]:
  """Conflicts between objectives' gradients, in training and at checkpoints."""
  yield from _describe_conflicts(runs)
  yield from interference.describe_checkpoints(runs)


def _describe_conflicts(runs: Sequence[RunRecord]) -> Iterator[page.PageBlock]:
  """Conflicts between objectives' gradients in training."""
  arms = group_by_arm(runs).items()
  maps_by_arm = {arm: draw_interference(runs) for arm, runs in arms}
  maps_by_arm = {arm: maps for arm, maps in maps_by_arm.items() if maps}
  if not maps_by_arm:
    return
  yield page.Heading("Gradients of objectives")
  yield page.Note(_GRADIENTS_NOTE)
  for arm, maps in maps_by_arm.items():
    yield page.Heading(arm, level=3)
    yield page.Charts(maps)


def draw_interference(runs: Sequence[RunRecord]) -> list[Chart]:
  """Gradient conflicts of an arm's runs, averaged over measurements and seeds.

  Skips measurements whose objectives differ from the last measurement, as some
  objectives start later.
  """
  rows = [row for run in runs for row in run.interference]
  if not rows or len(rows[-1]["objectives"]) < 2:
    return []
  objectives, blocks = rows[-1]["objectives"], rows[-1]["blocks"]
  keys = ("objectives", "blocks")
  rows = [r for r in rows if all(r[key] == rows[-1][key] for key in keys)]
  pairs = [", ".join(pair) for pair in itertools.combinations(objectives, 2)]
  losses = dict(columns=objectives, x_label="loss")
  heat_maps = []
  for key, title, names, options in (
    ("cosines", "Cosine of two gradients", pairs, dict(limit=1)),
    ("norms", "Norm of the gradient", objectives, {}),
    ("transfer", "Fall of losses (%) along a gradient", objectives, losses),
  ):
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
      continue
    values = np.array(values, float)
    if key == "cosines":  # 0 without a gradient.
      values = values[:, *np.triu_indices(len(objectives), 1)]
      values[values == 0] = np.nan
    options = dict(columns=blocks, x_label="block") | options
    mean = interference.average_known(values)
    mean = (mean * (100 if key == "transfer" else 1)).tolist()
    name = file_name(key, runs[0].arm)
    heat_maps.append(
      charts.heat_map(title, mean, rows=names, name=name, **options)
    )
  return heat_maps + _draw_conflicts(runs)


def _draw_conflicts(runs: Sequence[RunRecord]) -> list[Chart]:
  lines = []
  for colour, run in enumerate(runs):
    rows = [r for r in run.interference if r.get("conflicts") is not None]
    points = [(row["step"], 100 * row["conflicts"]) for row in rows]
    name = f"seed {run.seed}" if len(runs) > 1 else run.name
    lines.append(Series(name, points, colour))
  if not any(len(line.points) > 1 for line in lines):
    return []
  name = file_name("conflicts", runs[0].arm)
  title = "Negative cosines (% of pairs and blocks)"
  return [charts.line_chart(title, lines, name=name, x_label="step")]


def load_image(
  title: str, source: pathlib.Path, output: pathlib.Path, *names: str
) -> page.ImageFile:
  """Loads an image of a run; `names` name its copy if outside of `output`."""
  source = source.resolve()
  image = read_image(source)
  if image.shape[1] > _MAX_WIDTH:
    longer_side = _MAX_WIDTH * max(image.shape[:2]) // image.shape[1]
    image = np.asarray(plots.fit_image(image, longer_side))
  path = f"sheets/{file_name(*names)}.png"
  if source.is_relative_to(output.resolve()):
    path = source.relative_to(output.resolve()).as_posix()
  return page.ImageFile(title, image, path, source)


def describe_samples(
  runs: Sequence[RunRecord], output: pathlib.Path
) -> Iterator[page.PageBlock]:
  """Training images with the captions, boxes and depth that the model reads.

  All come from the run with the most kinds of labels.
  """
  run = max(runs, key=lambda r: len(r.samples.get("labelled", ())))
  samples = [
    load_image(caption, file, output, run.name, "sample", str(i))
    for i, caption in enumerate(run.samples.get("captions", ()))
    if (file := (run.folder / SAMPLES).with_name(f"{i}.png")).exists()
  ]
  if samples:
    yield page.Heading("Training samples")
    yield page.Images(samples)
    yield page.Note(_SAMPLES_NOTE)


def describe_sheets(
  runs: Sequence[RunRecord], output: pathlib.Path
) -> Iterator[page.PageBlock]:
  """Image grids of evaluations; several runs' grids are side by side."""
  sheets = []
  for run in runs:
    for (evaluation, name), file in run.sheets.items():
      kind = getattr(run.outcome.results.get(evaluation), "type", "")
      title = evaluations.name_evaluation(evaluation, kind)
      names = (run.name, evaluation, name)
      image = load_image(run.name, file, output, *names)
      sheets.append((title, name, image))
  return evaluations.describe_sheets(sheets)


def describe_configs(runs: Sequence[RunRecord]) -> Iterator[page.PageBlock]:
  """Commands, config differences, and configs."""
  commands = [run.command for run in runs if run.command]
  if commands:
    yield page.Heading("Commands")
    yield page.Code("\n".join(commands))
  yield page.Heading("Configs")
  if len(runs) > 1:
    table = config_table(runs)
    note = page.Note("The configs are equal.")
    yield page.Table(table) if len(table) > 1 else note
  for run in runs:
    text = json.dumps(run.config, indent=1, sort_keys=True)
    yield page.Details(f"Config of {run.name}", [page.Code(text)])


def runs_table(
  runs: Sequence[RunRecord], *, timed: bool = True
) -> list[list[str]]:
  """Summary of the runs: a header, then a row per run."""
  colours = {arm: i for i, arm in enumerate(group_by_arm(runs))}
  rows = [["run", "seed", "steps", "images"]]
  rows[0] += ["images/s"] if timed else []
  for run in runs:
    batch, steps = run.config.get("batch_size") or 0, run.step
    total = run.config.get("total_steps")
    progress = f"{steps:,}"
    progress += "" if total in (None, steps) else f"/{total:,}"
    name = page.Swatch(run.name, colours[run.arm])
    rows.append([name, str(run.seed), progress, f"{steps * batch:,}"])
    if timed:
      points = run.series.get("speed/images_per_second")
      rows[-1].append(f"{points[-1][1]:.0f}" if points else tables.EMPTY)
  return rows


def config_table(runs: Sequence[RunRecord]) -> list[list[str]]:
  """Config keys that differ, without seeds: a header, then a row per key."""
  rows = [["key", *(run.name for run in runs)]]
  for key, values in list_differences([run.config for run in runs]):
    # None is equivalent to an absent key.
    if key == "seed" or all(value in (None, ABSENT) for value in values):
      continue
    rows.append([key])
    for value in values:
      is_set = value not in (None, ABSENT)
      rows[-1].append(
        format_setting(value, _MAX_CHARACTERS) if is_set else tables.EMPTY
      )
  return rows
