"""The initial state of a run: random, or loaded from `config.init`."""

import functools
import logging
from typing import Any

import jax
from jaxtyping import PyTree

from mtv_jax.checkpoint.partial_restore import merge_params
from mtv_jax.encoder import hub, loading
from mtv_jax.encoder.preprocess import preprocess_from_config
from mtv_jax.objectives.base import TEACHER
from mtv_jax.train.build_step import TrainStep
from mtv_jax.train.run import RunConfig
from mtv_jax.train.spec import init_params, teacher_params
from mtv_jax.train.state import TrainState
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names, select_names

log = logging.getLogger(__name__)

# Tokenizers that encode these equally are considered equal. They cover case,
# punctuation, digits, spaces and non-ASCII letters.
_PROBE_TEXTS = (
  "A photo of 2 dogs, playing!  It's Mary's red-and-white BALL.",
  "ein Mädchen im Café \u2013 \u00bfd\u00f3nde? \u732b\u3068\u72ac",
  "a small blue circle left of a large green square",
)


def initialize_state(train_step: TrainStep) -> TrainState:
  """The state at step 0, from `config.init` or random parameters."""
  params = jax.jit(
    functools.partial(init_params, train_step.step_spec),
    out_shardings=train_step.program.shardings.params,
  )(jax.random.key(train_step.config.seed))
  teacher = None
  if init := train_step.config.init:
    source = loading.read_params(
      init.path,
      weights=init.weights,
      step=init.step,
      spec=train_step.step_spec.model,
      preprocess=preprocess_from_config(
        train_step.config.model, train_step.config.views
      ),
    )
    params, report = merge_params(
      params,
      source,
      include=init.include or ("",),
      rename=init.rename,
      min_coverage=init.min_coverage,
      optional=r"heads/[^/]+/" if init.grow_heads else None,
    )
    log.info("Initialised from %s:\n%s", hub.pin_name(init.path), report)
    if init.teacher:
      teacher = init_teacher(train_step, params)
  return train_step.program.init(
    params, read_teacher_params(train_step), teacher
  )


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
    theirs, ours = (t.encode([text], length)[0] for t in (source, tokenizer))
    if list(theirs) != list(ours):
      raise ConfigError(
        f"config.model.text: {init.path} was trained with {source!r}, this run "
        f"has {tokenizer!r}, which encodes {text!r} differently. Use "
        "the source's tokenizer and clean, or set "
        "config.init.new_tokenizer=True to learn new token embeddings."
      )


def init_teacher(train_step: TrainStep, params: PyTree) -> PyTree:
  """Reads the EMA teacher of the run at `config.init.path`.

  Parameters that `init.include` excludes, such as new heads, are copied from
  the student.
  """
  init, spec = train_step.config.init, train_step.step_spec
  if spec.first_reads.get(TEACHER, 0) > 0:
    raise ConfigError(
      "config.init.teacher has no effect: no objective reads the teacher at "
      "step 0, and when the first one starts, the teacher is a copy of the "
      "student. Leave init.teacher out, or start the objective at step 0."
    )
  student = teacher_params(spec, params)
  names = [name for name, _ in flatten_with_names(student)]
  patterns = init.include or ("",)
  include = [regex for regex in patterns if select_names(names, [regex])]
  if not include:
    raise ConfigError(
      "config.init.teacher: init.include selects no parameter of a teacher "
      "that this run trains. Leave init.teacher out."
    )
  source = loading.read_teacher(
    init.path, step=init.step, spec=spec.model, image="image" in student
  )
  teacher, report = merge_params(
    student,
    source,
    include=include,
    rename=init.rename,
    min_coverage=init.min_coverage,
  )
  log.info("Teacher initialised from %s:\n%s", init.path, report)
  return teacher


def read_teacher_params(train_step: TrainStep) -> dict[str, Any]:
  """Reads frozen teachers that have a path: `{name: {image: ...}}`."""
  abstract, loaded = train_step.program.abstract.teachers, {}
  for name in abstract:
    entry = train_step.config.teachers[name]
    if entry.path is None:
      continue
    source = loading.read_params(
      entry.path,
      weights=entry.weights,
      step=entry.step,
      spec=train_step.step_spec.teachers[name].model,
    )
    loaded[name], report = merge_params(
      abstract[name], {"image": source["image"]}, min_coverage=1.0
    )
    source = hub.pin_name(entry.path)
    log.info("Teacher %s, from %s: %s", name, source, report)
  return loaded
