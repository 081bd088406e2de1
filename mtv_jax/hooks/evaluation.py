"""Evaluations during training, `config.evals`, with their bounds."""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Iterable, Mapping

import jax

from mtv_jax.config.durations import RunLength
from mtv_jax.data import registry as sources_lib
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import preprocess_from_config
from mtv_jax.evals import run as evals_lib
from mtv_jax.evals.core import base as evals_base
from mtv_jax.evals.core import results as results_lib
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.datasets import class_folders
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.models.heads import PredictionHead, head_type
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.parallel.distributed import agree, any_process, gather_results
from mtv_jax.train.config import EvalConfig, RunConfig
from mtv_jax.train.hooks import Hook
from mtv_jax.train.run import Run
from mtv_jax.train.spec import TrainState
from mtv_jax.train.train_loop import Trainer
from mtv_jax.train.workdir import read_recorded_config
from mtv_jax.utils.errors import ConfigError, UserError
from mtv_jax.utils.text import format_setting, list_first

log = logging.getLogger(__name__)

# Test images or pairs on the image grids of evaluations during training.
PICTURES = 3
# Entries of `val=` that would take a folder's subfolders as classes.
_CLASSIFICATIONS = ("zero_shot", "knn")
_NAME_DATA = (
  "Name held-out data in --config (val=PATH, imagenet=PATH, coco=PATH, ...)."
)


class EvaluationHook(Hook):
  """Evaluates the current parameters, by `config.evals`.

  Writes metrics and protocol to `evals/NAME_STEP.json`, and metrics of
  resamples to `evals/NAME_STEP.npz`; after the last step also image sheets,
  `evals/NAME_STEP/SHEET.png`. Without `allow_scenes`, a new run on a TPU or
  several hosts that trains on other data must not be evaluated only on scenes.
  """

  def __init__(self, *, allow_scenes: bool = False):
    self.allow_scenes = allow_scenes
    self.evaluators: dict[str, evals_base.Evaluator] = {}

  def open(self, run: Run) -> None:
    """Opens the evaluations' data, without optional ones that lack theirs.

    Raises ConfigError if an evaluation can't evaluate the run.
    """
    agree({"allow_scene_evals": self.allow_scenes})
    self.evaluators = choose_evaluators(run)
    is_large = jax.process_count() > 1 or jax.default_backend() == "tpu"
    is_new = not read_recorded_config(run.workdir)
    if is_large and is_new and not self.allow_scenes:
      check_data(run.config, self.evaluators)
    self.evaluators = open_evaluators(run.config, self.evaluators)

  def describe(self, run: Run) -> list[str]:
    """Lists the evaluations with their data and schedule."""
    evaluations = list_evaluations(run.config, run.length)
    texts = [
      f"{name} on {data}{_format_count(evaluator)}, {schedule}"
      for name, evaluator in self.evaluators.items()
      for data, schedule in [evaluations[name]]
    ]
    return [f"Evaluations: {'; '.join(texts) or 'none'}."]

  def before_first_step(self, trainer: Trainer) -> None:
    if trainer.start_step == 0:
      # Includes evaluations with a bound, so a misspelt metric fails early.
      evals = {n: trainer.run.config.evals[n] for n in self.evaluators}
      due = [n for n, e in evals.items() if e.at_start or e.bound]
      self.evaluate(trainer, 0, due)
    else:
      # The previous session may have exited between save and evaluation.
      step = trainer.start_step
      self.evaluate(trainer, step, self.list_missing(trainer.run, step))

  def after_step(self, trainer: Trainer, step: int) -> None:
    self.evaluate(trainer, step, self.list_due(trainer.run, step))

  def list_due(self, run: Run, step: int) -> list[str]:
    """The evaluations due after a step; all after the last step."""
    is_last, evals = step >= run.total_steps, run.config.evals
    return [
      name
      for name in self.evaluators
      if is_last or run.is_due(evals[name].every, step)
    ]

  def list_missing(self, run: Run, step: int) -> list[str]:
    """The due evaluations that lack a file or have a metric out of bounds.

    The last step is saved before it is evaluated, so a run that a bound stopped
    there evaluates again when it is restarted.
    """

    def is_missing(name):  # Process 0 decides.
      return jax.process_index() == 0 and not _is_evaluated(run, name, step)

    due = self.list_due(run, step)
    return [name for name in due if any_process(is_missing(name))]

  def evaluate(self, trainer: Trainer, step: int, names: Iterable[str]) -> None:
    """Evaluates; after a signal only at the last step."""
    run, config = trainer.run, trainer.run.config
    for name in names:
      if trainer.notice.received and step < run.total_steps:
        return  # The resumed run evaluates it.
      entry = config.evals[name]
      trainer.session.report(step, f"evaluate {name}")
      with trainer.pause_timers("evaluate"):
        weights = entry.weights or config.weights
        encoder = build_encoder(run, trainer.state, step, weights)
        results = evals_lib.evaluate(encoder, {name: self.evaluators[name]})
        if jax.process_index() == 0:
          path = evals_path(run, name, step)
          with trainer.writer.tolerate_errors(str(path.parent)):
            is_last = step >= run.total_steps
            stem = path.with_suffix("")
            results_lib.write_arrays(stem, results[name], sheets=is_last)
            results_lib.write_json(path, encoder, results)
        result = results[name]
        scalars = {f"{name}/{k}": v for k, v in result.metrics.items()}
        trainer.writer.write_scalars(step, scalars)
      if entry.bound is not None:
        _check_bound(run, name, result, step)


def build_encoder(
  run: Run, state: TrainState, step: int, weights: str
) -> Encoder:
  """An encoder of a run's parameters; see `TrainState.weights`."""
  return Encoder(
    run.spec.model,
    run.spec.merge_adapters(state.weights(weights)),
    preprocess_from_config(run.config.model, run.config.views),
    run.tokenizer,
    run.mesh,
    dtype=str(run.spec.dtype),
    weights=weights,
    source=f"{run.workdir.name} at step {step}",
    prediction_heads=run.prediction_heads,
  )


def evals_path(run: Run, name: str, step: int) -> pathlib.Path:
  return run.workdir / "evals" / f"{name}_{step}.json"


def _check_bound(run: Run, name: str, result: Result, step: int) -> None:
  """Raises RollbackError or BoundError if a metric is out of bounds."""
  entry = run.config.evals[name]
  entry.bound.value(name, result)
  if not step and not entry.at_start:
    return
  is_met = gather_results(lambda: _is_within(run, name, result))[0]
  # The step of the previous evaluation; 0 if this is the first.
  every = run.length.steps(entry.every)
  previous = (step - 1) // every * every if every and step else 0
  entry.bound.check(name, result, step, previous, is_met=is_met)


def _is_evaluated(run: Run, name: str, step: int) -> bool:
  """Whether an evaluation has a file and its metric is within bounds."""
  path, bound = evals_path(run, name, step), run.config.evals[name].bound
  try:
    if not path.exists() or bound is None:
      return path.exists()
    result = _read_result(run, name, step)
    return bound.metric in result.metrics and _is_within(run, name, result)
  except Exception as error:  # Other hosts wait for the answer.
    log.warning("%s can't be read (%r): evaluating again.", path, error)
    return False


def _read_result(run: Run, name: str, step: int) -> Result:
  (outcome,) = results_lib.read(path := evals_path(run, name, step))
  resamples = results_lib.read_resamples(path)
  return dataclasses.replace(outcome.results[name], resamples=resamples)


def _is_within(run: Run, name: str, result: Result) -> bool:
  """Whether a result is within its bound; always True except on process 0."""
  if jax.process_index():
    return True
  bound, initial_result = run.config.evals[name].bound, None
  if bound.drop:
    path = evals_path(run, name, 0)
    initial_result = _read_result(run, name, 0) if path.exists() else None
    if initial_result is None or bound.metric not in initial_result.metrics:
      raise ConfigError(
        f"config.evals.{name}.bound.drop compares with {path}, which lacks "
        f"{bound.metric!r}: restore it, or set min instead."
      )
  return bound.is_met(result, initial_result)


def build_evaluators(
  evals: Mapping[str, EvalConfig],
) -> dict[str, evals_base.Evaluator]:
  """Builds the evaluators of a config by name, without opening data.

  Image sheets have `PICTURES` items unless an entry sets its own `pictures`.
  Raises ConfigError if a bound's metric is known not to exist.
  """
  evaluators = {}
  for name, entry in evals.items():
    defaults = evals_base.default_options(entry.type)
    sheet_options = {"pictures": PICTURES} if "pictures" in defaults else {}
    options = {"type": entry.type, **sheet_options, **entry.options}
    evaluators[name] = evals_base.build_evaluator(name, options)
    metric = entry.bound and entry.bound.metric
    # A subclass may have further metrics.
    pattern = vars(type(evaluators[name])).get("metric_pattern")
    if metric and pattern and not re.fullmatch(pattern, metric):
      raise ConfigError(
        f"config.evals.{name}.bound.metric: {name} has no {metric!r}; expected"
        f" a match of {pattern}."
      )
  return evaluators


def evaluable(
  model: ModelSpec, heads: Mapping[str, PredictionHead]
) -> frozenset[str]:
  """Lists a run's capabilities, which `Evaluator.requires` names."""
  text = {"text"} if model.text is not None else set()
  return frozenset(text | {*heads} | {*map(head_type, heads.values())})


def choose_evaluators(run: Run) -> dict[str, evals_base.Evaluator]:
  """Builds the evaluators; raises ConfigError if one can't evaluate the run."""
  config = run.config
  capabilities = evaluable(run.spec.model, run.prediction_heads)
  weights = {"config.weights": config.weights}
  for name, entry in config.evals.items():
    weights[f"config.evals.{name}"] = entry.weights or config.weights
  for where, kind in weights.items():
    try:
      run.train_step.abstract.weights(kind)
    except ConfigError as error:
      raise ConfigError(f"{where}: {error}") from None
  evaluators = build_evaluators(config.evals)
  for name, evaluator in [*evaluators.items()]:
    entry = config.evals[name]
    missing = sorted(evaluator.requires - capabilities)
    if entry.optional and (missing or evaluator.reads_folder):
      del evaluators[name]
    elif evaluator.reads_folder:
      raise ConfigError(
        f"config.evals.{name} can't evaluate a run in training. Evaluate its"
        f" checkpoints: mtv-jax evaluate --encoder=RUN --evals={entry.type}."
      )
    elif missing:
      what = f"objective {missing[0]!r}"
      what = "a text tower" if "text" in missing else what
      raise ConfigError(
        f"config.evals.{name} evaluates {what}, which this run does not train."
        f" Add it, or leave the evaluation out (--config.evals.{name}=None)."
      )
  return evaluators


def open_evaluators(
  config: RunConfig, chosen: Mapping[str, evals_base.Evaluator]
) -> dict[str, evals_base.Evaluator]:
  """Opens the evaluations' data, to fail early.

  Returns them without the optional ones whose data lack what they need.
  Collective: all processes call it, with equal configs.
  """
  evaluators, left_out = {}, {}
  for name, evaluator in chosen.items():
    entry = config.evals[name]
    try:
      if entry.optional and entry.type in _CLASSIFICATIONS:
        class_folders.reject_captioned(entry.options.get("data"))
      evaluator.prepare()
      evaluators[name] = evaluator
    except evals_base.NotApplicable as error:
      if not entry.optional:
        error.add_note(f"(in config.evals.{name})")
        raise
      left_out[name] = str(error).rstrip(".")
    except UserError as error:
      error.add_note(f"(in config.evals.{name})")
      raise
  optional = [n for n in evaluators if config.evals[n].optional]
  if left_out and not optional:
    reasons = "; ".join(f"{name}: {text}" for name, text in left_out.items())
    raise ConfigError(f"No optional evaluation can be run. {reasons}.")
  for name, reason in left_out.items():
    log.info("Skipping the evaluation %s: %s.", name, reason)
  agree({"evaluations": sorted(evaluators)})
  data = [e.options.get("data") for e in config.evals.values() if e.optional]
  data = [d if isinstance(d, Mapping) else {"path": d} for d in data]
  data = data if jax.process_index() == 0 else []
  if overlaps := sources_lib.list_shared(config.data.train, data):
    names = list_first(overlaps, 3)
    log.warning(f"Training data overlaps evaluation data: {names}.")
  if not evaluators:
    log.warning("This run has no evaluations. %s", _NAME_DATA)
  return evaluators


def check_data(
  config: RunConfig, evaluators: Mapping[str, evals_base.Evaluator]
) -> None:
  """Raises ConfigError if a run on other data is evaluated only on scenes."""
  data = [getattr(e, "data", None) for e in evaluators.values()]
  train = config.data.train
  has_user_data = any(entry.get("type") != "scenes" for entry in train)
  if data and has_user_data and all(map(is_scenes, data)):
    names = ", ".join(evaluators)
    raise ConfigError(
      f"This run would be evaluated only on rendered scenes ({names})."
      f" {_NAME_DATA} Or pass --allow_scene_evals."
    )


def list_evaluations(
  config: RunConfig, length: RunLength
) -> dict[str, tuple[str, str]]:
  """Data and schedule of each evaluation of a config; opens no data."""
  rows = {}
  for name, entry in config.evals.items():
    defaults = evals_base.default_options(entry.type)
    data = entry.options.get("data", defaults.get("data"))
    every = length.steps(entry.every)
    rows[name] = (
      "no data" if data is None else format_setting(data, 60),
      f"every {every:,} steps" if every else "after the last step",
    )
  return rows


def _format_count(evaluator: evals_base.Evaluator) -> str:
  count = evaluator.count_images()
  return "" if count is None else f" ({count:,} images)"
