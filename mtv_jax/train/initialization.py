"""The initial state of a run: random, or of `config.init`.

Also the frozen teachers of `config.teachers`: their architectures, which become
part of the resolved config, and their parameters.
"""

import functools
import logging
import pathlib
import re
from typing import Any

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mtv_jax.checkpoint.checkpointer import saved_steps
from mtv_jax.checkpoint.partial_restore import merge_params
from mtv_jax.config import schema
from mtv_jax.encoder import loading
from mtv_jax.encoder.preprocess import Preprocess, preprocess_from_config
from mtv_jax.objectives.base import TEACHER
from mtv_jax.train.state import TrainState
from mtv_jax.train.step_spec import init_params, teacher_params
from mtv_jax.train.train_step import TrainStep
from mtv_jax.train.workdir import read_recorded_config
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

log = logging.getLogger(__name__)


def initialize_state(train_step: TrainStep) -> TrainState:
  """The state at step 0: parameters of `config.init`, or random ones.

  Raises:
    ConfigError: for a `config.init` that doesn't fit the run.
    InputError: for a model that can't be read, or lacks parameters.
  """
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
      preprocess=preprocess_from_config(train_step.config),
    )
    params, report = merge_params(
      params,
      source,
      include=init.include or ("",),
      rename=init.rename,
      min_coverage=init.min_coverage,
    )
    log.info("Initialised from %s:\n%s", init.path, report)
    if init.teacher:
      teacher = init_teacher(train_step, params)
  return train_step.program.init(
    params, read_teacher_params(train_step), teacher
  )


def init_teacher(train_step: TrainStep, params: PyTree) -> PyTree:
  """The EMA teacher of the run that `config.init` names.

  Parameters that `init.include` leaves out, such as those of new heads, are
  copies of the student's.
  """
  init, spec = train_step.config.init, train_step.step_spec
  if spec.first_reads.get(TEACHER, 0) > 0:
    raise ConfigError(
      "config.init.teacher has no effect: no objective reads the teacher at "
      "step 0, and at the start of the first that does it is a copy of the "
      "student. Leave init.teacher out, or start the objective at step 0."
    )
  student = teacher_params(spec, params)
  names = [name for name, _ in flatten_with_names(student)]
  include = [
    regex
    for regex in init.include or ("",)
    if any(re.search(regex, name) for name in names)
  ]
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
  """Parameters of the frozen teachers that have a path, as `{image: ...}`."""
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
    log.info("Teacher %s, from %s: %s", name, entry.path, report)
  return loaded


def read_teacher_models(
  config: ConfigDict, workdir: pathlib.Path | None = None
) -> None:
  """Records the architectures of teachers with a path in a resolved config.

  A run that resumes has recorded them, and their parameters are in its
  checkpoints: the teachers' own folders are not read.

  Raises:
    ConfigError: one was trained with other pixel statistics than this run's.
  """
  ours = preprocess_from_config(config)
  recorded = {}
  if config.teachers and workdir is not None and saved_steps(workdir):
    recorded = read_recorded_config(workdir).get("teachers") or {}
  for name, entry in config.teachers.items():
    # Refreshed from the EMA teacher, it has the student's.
    refreshed = any(entry.get(f"update_every_{u}") for u in schema.UNITS)
    if entry.path is None or entry.model is not None or refreshed:
      continue
    same = recorded.get(name) or {}
    named = all(same.get(k) == entry[k] for k in ("path", "weights", "step"))
    if named and same.get("model"):
      entry.model = same["model"]
      continue
    model = loading.read_model(
      entry.path, weights=entry.weights, step=entry.step
    )
    theirs = Preprocess.from_dict(model.preprocess)
    if (theirs.mean, theirs.std) != (ours.mean, ours.std):
      raise ConfigError(
        f"config.teachers.{name}: {entry.path} takes pixels of mean "
        f"{theirs.mean} and deviation {theirs.std}, this run's views have "
        f"{ours.mean} and {ours.std}. Train with the teacher's."
      )
    entry.model = model.spec.to_dict()["image"]
