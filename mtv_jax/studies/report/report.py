"""Report of runs: one HTML page that needs no other file, and Markdown.

`write_study` is the report of a study. `write_runs` compares any runs, and with
one run is that run's report.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from mtv_jax.evals.encoder_requests import distinct_names
from mtv_jax.evals.report import tables
from mtv_jax.evals.report.report import file_name
from mtv_jax.studies import changes, results, runner
from mtv_jax.studies.folders import RunFolder, name_arms, read_run
from mtv_jax.studies.report import change_figures, run_figures
from mtv_jax.studies.report.study_sections import describe_study
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.pages import Block, ImageFile, write_pages

_VALUES_NOTE = (
  "Chance is what random embeddings or guesses would give. ±: standard error "
  "over the items of the test set; bars of charts are 1.96 of them to both "
  "sides. ↓: lower is better. A dash is a missing value, or one on other data."
)
_CURVES_NOTE = (
  "Of more than 160 logged steps, neighbours are averaged. A curve of several "
  "seeds is their mean, in an area from the least to the largest."
)
_GRADIENTS_NOTE = (
  "Means over the measurements of a run. Where the cosine is negative, a step "
  "along one gradient raises the other loss, to first order. In the fall of "
  "losses, rows are the objectives whose gradient is followed."
)
_CHANGES_NOTE = (
  "Main metrics that were evaluated before the first step, on the same items. "
  "Intervals are 95 % over items, and over seeds too where there are several; "
  "the last column counts evaluations that are worse than the start beyond "
  "theirs. They are not corrected for the number of evaluations."
)
_MAX_WIDTH = 1200  # Pixels of a sheet on the page.
_MAX_NAMES = 4  # Of runs in the title.


def write_runs(
  runs: Sequence[str | os.PathLike], output: str | os.PathLike
) -> list[pathlib.Path]:
  """Writes the report of one run, or of several over each other.

  Args:
    runs: folders of runs, finished or not.
    output: folder of `report.html`, `report.md` and the images of the latter.

  Returns:
    The two pages.

  Raises:
    ConfigError: for the same folder twice, or a study among them.
    MissingFileError: for a folder that is not a run's.
  """
  paths = [str(pathlib.Path(run)) for run in runs]
  if len({*map(os.path.realpath, paths)}) < len(paths):
    raise ConfigError(f"a run is given twice: {', '.join(paths)}")
  paths = [os.path.realpath(path) for path in paths]
  for path in paths:
    if os.path.exists(os.path.join(path, runner.STUDY)):
      raise ConfigError(
        f"{path} is a study. Give it alone, or its runs: {path}/{runner.RUNS}/*"
      )
  names = distinct_names(paths)
  read = [read_run(p, name=n) for p, n in zip(paths, names, strict=True)]
  read = name_arms(read)
  title = ("Run " if len(read) == 1 else "Runs ") + ", ".join(names)
  if len(read) > _MAX_NAMES:
    title = f"{len(read)} runs"
  return write_pages(title, _describe_runs(read, output), output)[:2]


def write_study(
  folder: str | os.PathLike, output: str | os.PathLike | None = None
) -> list[pathlib.Path]:
  """Writes the report of a study, from the runs that are finished.

  Args:
    folder: of the study.
    output: folder of the pages; default: that of the study.

  Returns:
    The two pages.

  Raises:
    InputError: it is not a study, a run has other settings than the study's,
      or a file can't be read.
  """
  study = results.read_study(pathlib.Path(folder))
  output = folder if output is None else output
  arms = run_figures.group_by_arm(study.runs)
  first = [members[0] for members in arms.values()]
  blocks = [*describe_study(study)]
  if study.runs:
    # Without times: a study that is resumed gives the same report.
    blocks += describe_training(study.runs, timed=False)
    blocks += describe_gradients(study.runs)
    blocks += describe_sheets(first, output)
    blocks.append(Block("heading", "Runs"))
    table = run_figures.runs_table(study.runs, timed=False)
    blocks.append(Block("table", table, {"numbers": 1}))
    blocks += describe_configs(first)
  return write_pages(f"Study: {study.study.kind}", blocks, output)[:2]


def format_run(folder: str | os.PathLike) -> str:
  """The last metrics of a run with chance, as a text table; "" if none."""
  outcome = read_run(folder).outcome
  return tables.format_metrics([outcome]) if outcome.results else ""


def _describe_runs(
  runs: Sequence[RunFolder], output: str | os.PathLike
) -> Iterator[Block]:
  """The report's sections on runs; those that differ by the seed are an arm."""
  yield Block("table", run_figures.runs_table(runs), {"numbers": 1})
  evaluated = [run for run in runs if run.outcome.results]
  if evaluated:
    yield Block("heading", "Metrics")
    yield Block("table", run_figures.metrics_table(evaluated), {"numbers": 2})
    yield Block("note", _VALUES_NOTE)
    if len(runs) > 1:
      yield Block("note", f"Bold: {tables.BEST_NOTE}.")
      main, further = run_figures.draw_metrics(runs)
      yield Block("charts", main)
      if further:
        inner = (Block("charts", further),)
        yield Block("details", "Further metrics", inner=inner)
    else:
      yield Block("charts", run_figures.draw_run_metrics(runs[0]))
  yield from describe_changes(runs)
  yield from describe_training(runs)
  yield from describe_gradients(runs)
  yield from describe_sheets(runs, output)
  yield from describe_configs(runs)


def describe_changes(runs: Sequence[RunFolder]) -> Iterator[Block]:
  """How evaluations have changed since before the first step, if any was."""
  arms = run_figures.group_by_arm(runs)
  found = [c for arm in arms.values() for c in changes.measure_changes(arm)]
  if not found:
    return
  names = [*dict.fromkeys(c.metric.name for c in found)]
  found.sort(key=lambda change: names.index(change.metric.name))
  yield Block("heading", "Changes since the start")
  table = change_figures.changes_table(found)
  yield Block("table", table, {"numbers": 2})
  yield Block("note", _CHANGES_NOTE)
  colours = {arm: i for i, arm in enumerate(arms)}
  yield Block("charts", change_figures.draw_changes(found, colours))
  inner = (Block("table", change_figures.list_changes(found), {"numbers": 2}),)
  yield Block("details", "Every evaluation", inner=inner)


def describe_training(
  runs: Sequence[RunFolder], *, timed: bool = True
) -> Iterator[Block]:
  """Training curves of arms over each other, also of the speed if `timed`."""
  curves, further = run_figures.draw_training_curves(runs, timed=timed)
  if not curves and not further:
    return
  yield Block("heading", "Training")
  yield Block("note", _CURVES_NOTE)
  yield Block("charts", curves)
  if further:
    inner = (Block("charts", further),)
    yield Block(
      "details", "Further metrics, gradient norms, weights, speed", inner=inner
    )


def describe_gradients(runs: Sequence[RunFolder]) -> Iterator[Block]:
  """Conflicts between the gradients of objectives, where they are measured."""
  arms = run_figures.group_by_arm(runs).items()
  drawn = {arm: run_figures.draw_interference(runs) for arm, runs in arms}
  drawn = {arm: maps for arm, maps in drawn.items() if maps}
  if not drawn:
    return
  yield Block("heading", "Gradients of objectives")
  yield Block("note", _GRADIENTS_NOTE)
  for arm, maps in drawn.items():
    yield Block("heading", arm, {"level": 3})
    yield Block("charts", maps)


def describe_sheets(
  runs: Sequence[RunFolder], output: str | os.PathLike
) -> Iterator[Block]:
  """Images of evaluations, those of the runs side by side."""
  keys = dict.fromkeys(key for run in runs for key in run.sheets)
  if keys:
    yield Block("heading", "Images")
  for evaluation, name in keys:
    sheets = [
      _read_sheet(run, evaluation, name, pathlib.Path(output))
      for run in runs
      if (evaluation, name) in run.sheets
    ]
    yield Block("heading", f"{evaluation}: {name}", {"level": 3})
    yield Block("images", sheets)


def _read_sheet(
  run: RunFolder, evaluation: str, name: str, output: pathlib.Path
) -> ImageFile:
  source = run.sheets[evaluation, name].resolve()
  try:
    with Image.open(source) as file:
      image = file.convert("RGB")
  except OSError as error:
    raise InputError(
      f"{source} is not a whole image ({error}). Remove it."
    ) from None
  if image.width > _MAX_WIDTH:
    height = round(image.height * _MAX_WIDTH / image.width)
    image = image.resize((_MAX_WIDTH, height), Image.Resampling.LANCZOS)
  if source.is_relative_to(output.resolve()):
    path = source.relative_to(output.resolve()).as_posix()
  else:
    path = f"sheets/{file_name(run.name, evaluation, name)}.png"
  return ImageFile(run.name, np.asarray(image), path, source)


def describe_configs(runs: Sequence[RunFolder]) -> Iterator[Block]:
  """Commands, configs, and what differs between them."""
  commands = [run.command for run in runs if run.command]
  if commands:
    yield Block("heading", "Commands")
    yield Block("code", "\n".join(commands))
  yield Block("heading", "Configs")
  if len(runs) > 1:
    table = run_figures.config_table(runs)
    if len(table) > 1:
      yield Block("table", table)
    else:
      yield Block("note", "The configs are equal.")
  for run in runs:
    inner = (Block("code", run_figures.format_config(run.config)),)
    yield Block("details", f"Config of {run.name}", inner=inner)
