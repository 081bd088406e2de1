"""An experiment: a resolved config and everything that is built from it."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mtv_jax.checkpoint.reading import saved_steps
from mtv_jax.config import overrides, sections
from mtv_jax.data import ops, order, pipeline, tokenizers
from mtv_jax.data import registry as sources_lib
from mtv_jax.data.conversations import find_op
from mtv_jax.data.sources.base import Source, sample_captions
from mtv_jax.data.stats import Stats
from mtv_jax.data.tokenizers.source import TRAINED, TokenizerSource
from mtv_jax.encoder import loading
from mtv_jax.encoder.visual_language import CONVERSATION_TOKENIZER
from mtv_jax.evals.core import base as evals_base
from mtv_jax.evals.datasets import class_folders
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.models.heads import PredictionHead, head_type
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.parallel.distributed import agree, gather_results
from mtv_jax.parallel.mesh import find_host_rows
from mtv_jax.train import metrics
from mtv_jax.train.build_step import (
  TrainStep,
  build_train_step,
  make_config_mesh,
)
from mtv_jax.train.run import EvalConfig, RunConfig, resolve
from mtv_jax.train.workdir import check_workdir, read_recorded_config
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError, MissingFileError, UserError
from mtv_jax.utils.text import first_lines, list_first
from mtv_jax.utils.tree import select_names

log = logging.getLogger(__name__)

# Number of records on whose captions a tokenizer is trained.
_CAPTION_RECORDS = 100_000
# Test images or pairs on the image grids of evaluations during training.
PICTURES = 3
# Entries of `val=` that would take a folder's subfolders as classes.
_CLASSIFICATIONS = ("zero_shot", "knn")
_NAME_DATA = (
  "Name held-out data in --config (val=PATH, imagenet=PATH, coco=PATH, ...)."
)
# Tokenizers that encode these equally are considered equal. They cover case,
# punctuation, digits, spaces and non-ASCII letters.
_PROBE_TEXTS = (
  "A photo of 2 dogs, playing!  It's Mary's red-and-white BALL.",
  "ein Mädchen im Café \u2013 \u00bfd\u00f3nde? \u732b\u3068\u72ac",
  "a small blue circle left of a large green square",
)


@dataclasses.dataclass(frozen=True)
class Experiment(TrainStep):
  """A resolved config and everything that is built from it."""

  workdir: pathlib.PurePath  # `train` replaces a bucket by a local folder.
  tokenizer: Any  # None for a model without text.
  sources: list[Any]  # In the order of `config.data.train`.
  prediction_heads: dict[str, PredictionHead]
  evaluators: dict[str, evals_base.Evaluator]
  trackers: dict[str, metrics.Tracker]  # Not opened yet.

  @functools.cached_property
  def source_descriptions(self) -> list[dict[str, Any]]:
    """Files, record counts and label sets of each source, as JSON."""
    return [source.describe() for source in self.sources]


def build_experiment(
  config: sections.Config | RunConfig, workdir: str | os.PathLike
) -> Experiment:
  """Resolves a config and builds everything except the state.

  The evaluations' data are opened by `open_evaluations`.
  """
  check_workdir(workdir)
  config = resolve(config, workdir)
  trackers = metrics.build_trackers(config.log.trackers)
  mesh = make_config_mesh(config)
  _require_tokenizer(config)  # Before the data, which may be slow to open.
  # Limits and controls come last, because labels are aligned to whole sources.
  whole_sources = [
    sources_lib.build_source({**entry, **sources_lib.WHOLE})
    for entry in config.data.train
  ]
  entries = [*zip(config.data.train, whole_sources, strict=True)]
  limited_sources = [
    sources_lib.complete_source(source, {"limit": entry.get("limit")})
    for entry, source in entries
  ]
  tokenizer = _build_tokenizer(config, workdir, limited_sources)
  step = build_train_step(config, mesh, sum(map(len, limited_sources)))
  model = step.step_spec.model
  heads = loading.prediction_heads(config.to_dict(), model)
  op = find_op(config.data.ops)
  head_tokenizers = {
    "text": tokenizer,
    "conversation": op and op.text.tokenizer,
  }
  for head in heads.values():
    head.check_tokenizer(head_tokenizers[head.tokenizer])
  # Labels that no objective reads are not opened.
  labels = ops.build_ops(
    config.data.ops,
    tokenizer=tokenizer,
    batch_fields=step.step_spec.fields(),
    features=step.step_spec.feature_layouts,
  ).labels
  sources = [
    sources_lib.complete_source(
      source, {**entry, "labels": entry.get("labels") or None}, fields=labels
    )
    for entry, source in entries
  ]
  _warn_of_repeated_rows(config, sources)
  return Experiment(
    **vars(step),
    workdir=path_lib.as_path(workdir),
    tokenizer=tokenizer,
    sources=sources,
    prediction_heads=heads,
    evaluators=_choose_evaluators(step, evaluable(model, heads)),
    trackers=trackers,
  )


def _require_tokenizer(config: RunConfig) -> None:
  """Raises ConfigError if a text tower has no tokenizer set."""
  if config.model.text is None or config.model.text.tokenizer:
    return
  if config.init:
    path = config.init.path
    # If the folder is missing, the error is about the recipe's own tokenizer.
    with contextlib.suppress(MissingFileError):
      if loading.read_model_info(path).tokenizer is None:
        raise ConfigError(
          f"config.model.text.tokenizer is not set, and {path} has no tokenizer"
          " that can be read (tokenizer.json, spiece.model or tokenizer.model)."
          " Add the file, or set --config.model.text.tokenizer=FILE."
        )
  tokenizers.find_file("")


def _build_tokenizer(
  config: RunConfig, workdir: str | os.PathLike, sources: Sequence[Source]
) -> tokenizers.Tokenizer | None:
  """The tokenizer of a config; None for a model without text.

  A run with checkpoints reads the copy in its folder, unless a file is named;
  a new run may train a tokenizer on its sources' captions.
  """
  if (text := config.model.text) is None:
    return None
  source = TokenizerSource(text.tokenizer, text.clean)
  run = path_lib.as_path(workdir) if saved_steps(workdir) else None
  if run is not None:
    _check_tokenizer_unchanged(config, run)
  elif source.trained_size:
    source = _train_tokenizer(config, source, sources)
  is_named = path_lib.is_file(source.spec)
  tokenizer = source.find_files(None if is_named else run).build()
  where = "config.model.text.vocab_size"
  tokenizers.check_vocabulary(tokenizer, text.vocab_size, where=where)
  if (pad_id := text.options.get("pad_id")) not in (None, tokenizer.pad_id):
    log.warning(
      f"config.model.text.pad_id is {pad_id}, but {tokenizer!r} pads with"
      f" {tokenizer.pad_id}: the text tower does not exclude padding. Set"
      f" --config.model.text.pad_id={tokenizer.pad_id}."
    )
  if run is None:
    check_source_tokenizer(config, tokenizer)
  return tokenizer


def _check_tokenizer_unchanged(
  config: RunConfig, folder: pathlib.PurePath
) -> None:
  """Raises ConfigError if a run with checkpoints had a different tokenizer."""
  recorded = (read_recorded_config(folder).get("model") or {}).get("text") or {}
  text = config.model.text
  for name, new in (("tokenizer", text.tokenizer), ("clean", text.clean)):
    old = recorded.get(name, new)
    # A file may have moved, with the same content.
    if pathlib.PurePath(old).name != pathlib.PurePath(new).name:
      raise ConfigError(
        f"This run was trained with text.{name}={old!r}; {new!r} changes"
        " token ids. Restore the old value, or start a new run."
      )


def _train_tokenizer(
  config: RunConfig,
  tokenizer_source: TokenizerSource,
  sources: Sequence[Source],
) -> TokenizerSource:
  """Trains a tokenizer on the sources' captions, in a cached file.

  Collective: process 0 trains, and the others receive its model.
  """
  size = tokenizer_source.trained_size

  def train() -> bytes:
    if jax.process_index():
      return b""
    from mtv_jax.data.tokenizers.training import train_sentencepiece

    log.info("Training a tokenizer of %d pieces from the captions.", size)
    captions = sample_captions(sources, _CAPTION_RECORDS)
    return train_sentencepiece(captions, size, tokenizer_source.clean)

  agree({"config": config.to_dict()})  # Checks that all processes call this.
  data = gather_results(train)[0]
  digest = hashlib.blake2b(data, digest_size=12).hexdigest()
  file = path_lib.cache_folder() / f"tokenizer-{digest}" / TRAINED
  file.parent.mkdir(parents=True, exist_ok=True)
  atomic.write(file, data)
  return dataclasses.replace(tokenizer_source, spec=str(file))


def check_source_tokenizer(config: RunConfig, tokenizer: Any) -> None:
  """Raises ConfigError if a loaded text tower needs a different tokenizer.

  The run's tokenizer, with its cleaning, must encode texts like the tokenizer
  of `config.init.path`.
  """
  init = config.init
  if not init or init.new_tokenizer or tokenizer is None:
    return
  if not select_names(["text/token_embedding"], init.include or ("",)):
    return
  files = loading.read_model_info(init.path).tokenizer
  if files is None:
    return
  source, length = files.build(), config.model.text.length
  for text in _PROBE_TEXTS:
    pair = (source, tokenizer)
    theirs, ours = (t.encode_text(text, length)[0] for t in pair)
    if list(theirs) != list(ours):
      raise ConfigError(
        f"config.model.text: {init.path} was trained with {source!r}, but this "
        f"run has {tokenizer!r}, which encodes {text!r} differently. Use "
        "the source's tokenizer and clean, or set "
        "config.init.new_tokenizer=True to learn new token embeddings."
      )


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


def _choose_evaluators(
  step: TrainStep, capabilities: frozenset[str]
) -> dict[str, evals_base.Evaluator]:
  """Builds the evaluators; raises ConfigError if one can't evaluate the run."""
  config = step.config
  weights = {"config.weights": config.weights}
  for name, entry in config.evals.items():
    weights[f"config.evals.{name}"] = entry.weights or config.weights
  for where, kind in weights.items():
    try:
      step.program.abstract.weights(kind)
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


def open_evaluations(experiment: Experiment) -> Experiment:
  """Opens the evaluations' data, to fail early.

  Returns the experiment without the optional evaluations whose data lack what
  they need. Collective: all processes call it, with equal configs.
  """
  evaluators, left_out = {}, {}
  for name, evaluator in experiment.evaluators.items():
    entry = experiment.config.evals[name]
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
  optional = [n for n in evaluators if experiment.config.evals[n].optional]
  if left_out and not optional:
    reasons = "; ".join(f"{name}: {text}" for name, text in left_out.items())
    raise ConfigError(f"No optional evaluation can be run. {reasons}.")
  for name, reason in left_out.items():
    log.info("Skipping the evaluation %s: %s.", name, reason)
  agree({"evaluations": sorted(evaluators)})
  config = experiment.config
  data = [e.options.get("data") for e in config.evals.values() if e.optional]
  data = [d if isinstance(d, Mapping) else {"path": d} for d in data]
  data = data if jax.process_index() == 0 else []
  if overlaps := sources_lib.list_shared(config.data.train, data):
    names = list_first(overlaps, 3)
    log.warning(f"Training data overlaps evaluation data: {names}.")
  if not evaluators:
    log.warning("This run has no evaluations. %s", _NAME_DATA)
  return dataclasses.replace(experiment, evaluators=evaluators)


def check_evaluation_data(experiment: Experiment) -> None:
  """Raises ConfigError if a run on other data is evaluated only on scenes."""
  data = [getattr(e, "data", None) for e in experiment.evaluators.values()]
  train = experiment.config.data.train
  has_user_data = any(entry.get("type") != "scenes" for entry in train)
  if data and has_user_data and all(map(is_scenes, data)):
    names = ", ".join(experiment.evaluators)
    raise ConfigError(
      f"This run would be evaluated only on rendered scenes ({names})."
      f" {_NAME_DATA} Or pass --allow_scene_evals."
    )


def make_loader(
  experiment: Experiment,
  start_step: int,
  skipped: order.SkippedBatches = (),
  stats: Stats | None = None,
) -> pipeline.Loader:
  """Builds the loader of this process's batch rows, from `start_step` on."""
  config = experiment.config
  rows = find_host_rows(experiment.mesh)
  loader = pipeline.make_loader(
    config.data,
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start_step,
    skipped=skipped,
    process_index=rows.index,
    process_count=rows.count,
    tokenizer=experiment.tokenizer,
    batch_fields=experiment.step_spec.fields(),
    features=experiment.step_spec.feature_layouts,
    sources=experiment.sources,
    stats=stats,
  )
  experiment.require_fields(loader.fields)
  if config.model.text is not None and "caption" in loader.fields:
    (length,) = loader.fields["caption"].shape
    if length != config.model.text.length:
      raise ConfigError(
        f"config.data.ops makes captions of {length} tokens, but evaluations "
        f"and exports use config.model.text.length={config.model.text.length}. "
        "Set both to the same number."
      )
  return loader


def save_config(
  experiment: Experiment, command: str = "", *, is_new: bool = True
) -> None:
  """Writes resolved config, command and tokenizer file to the run's folder.

  An empty `command` does not replace a recorded one, and only a new run
  replaces a tokenizer that an earlier start left.
  """
  if jax.process_index() != 0:
    return
  experiment.workdir.mkdir(parents=True, exist_ok=True)
  # Temporary files of killed sessions.
  for folder in (experiment.workdir, experiment.workdir / "evals"):
    atomic.remove_abandoned(folder)
  path = experiment.workdir / "config.json"
  new = experiment.config.to_dict()
  data = (json.dumps(new, indent=2) + "\n").encode()
  old = path.read_bytes() if path.exists() else None
  recorded = new if old is None else read_recorded_config(experiment.workdir)
  if changes := overrides.describe_difference(recorded, new):
    log.warning(
      f"{path} has changed; the old one is config.json.old. If the seed, the"
      " batch size or the data changed, the run continues with other rows.\n"
      f"{first_lines(changes, 20)}"
    )
    shutil.copyfile(path, path.with_name("config.json.old"))
  if old != data:
    # Atomic, since resumed runs and studies read it even after a kill here.
    atomic.write(path, data)
  if command:
    atomic.write_text(path.with_name("command.txt"), command + "\n")
  op = find_op(experiment.config.data.ops)
  for folder, tokenizer in (
    ("tokenizer", experiment.tokenizer),
    (CONVERSATION_TOKENIZER, op and op.text.tokenizer),
  ):
    if not (source := getattr(tokenizer, "path", None)):
      continue
    folder = experiment.workdir / folder
    folder.mkdir(exist_ok=True)
    for file in tokenizers.list_files(source):
      target = folder / file.name
      if is_new or not target.exists():
        # Atomic, so that a later start does not accept a truncated file.
        with atomic.replace_file(target) as temporary:
          shutil.copyfile(file, temporary)


def _warn_of_repeated_rows(
  config: RunConfig, sources: Sequence[Source]
) -> None:
  """Warns of sources with fewer records than their rows in a batch."""
  size = config.batch_size
  weights = [sources_lib.read_weight(entry) for entry in config.data.train]
  for source, weight in zip(sources, weights, strict=True):
    rows = size * weight / sum(weights)
    if rows > len(source):
      log.warning(
        f"A batch of {size} takes {rows:.0f} rows of {source!r}, which has "
        f"only {len(source)} records: some are repeated, and contrastive losses"
        " count their captions as negatives. Reduce batch_size or the source's"
        " weight, or add data."
      )
