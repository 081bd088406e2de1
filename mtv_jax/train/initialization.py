"""The initial state of a run: random or loaded parameters, and statistics."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from mtv_jax.checkpoint.partial_restore import merge_params
from mtv_jax.models import lora
from mtv_jax.models.standardization import Moments, batch_moments
from mtv_jax.objectives.base import TEACHER, Batch
from mtv_jax.parallel.mesh import replicated_sharding, shard_batch
from mtv_jax.train.forward import add_views, encode, gather_params
from mtv_jax.train.gradients import split_batch
from mtv_jax.train.param_source import open_param_source
from mtv_jax.train.run import Run, make_loader
from mtv_jax.train.spec import StepSpec, TrainState, init_params, teacher_params
from mtv_jax.train.step import TrainStep
from mtv_jax.utils import progress, xla_flags
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names, select_names

log = logging.getLogger(__name__)
_ADAPTERS = rf".*{lora.PATTERN}"


def initialize_state(run: Run) -> TrainState:
  """The state at step 0, from `config.init` or random parameters."""
  log.info("Initialising.")
  with progress.activity("initialising"):
    return _initialize_state(run)


def _initialize_state(run: Run) -> TrainState:
  params = jax.jit(
    functools.partial(init_params, run.spec),
    out_shardings=run.train_step.shardings.params,
    compiler_options=xla_flags.compiler_options(run.mesh, runs_once=True),
  )(jax.random.key(run.config.seed))
  config, teacher = run.config, None
  if init := config.init:
    param_source = open_param_source()
    source = param_source.read_params(
      init.path,
      weights=init.weights,
      step=init.step,
      spec=run.spec.model,
      pixels=config.model.pixels,
    )
    head_pattern = r"heads/[^/]+/"
    if init.language_model:
      decoder = param_source.read_language_model(init.language_model).params
      heads, name = dict(source.get("heads", {})), param_source.LANGUAGE_MODEL
      heads[name] = {**heads.get(name, {}), "decoder": decoder}
      source = {**source, "heads": heads}
      head_pattern = rf"heads/(?!{name}/decoder/)({name}/)?[^/]+/"
    params, report = merge_params(
      params,
      source,
      include=init.include or ("",),
      rename=init.rename,
      min_coverage=init.min_coverage,
      optional=_ADAPTERS + (f"|{head_pattern}" if init.grow_heads else ""),
    )
    log.info(
      "Initialised from %s:\n%s", param_source.pin_name(init.path), report
    )
    if init.teacher:
      teacher = init_teacher(run, params)
      if init.weights == "teacher":  # With its heads, as in DINOv3.
        heads = {**params["heads"], **teacher["heads"]}
        params = {**params, "heads": heads}
  teachers = read_teacher_params(run)
  return run.train_step.init(params, teachers, teacher)


def init_teacher(run: Run, params: PyTree) -> PyTree:
  """Reads the EMA teacher of the run at `config.init.path`.

  Parameters that `init.include` excludes, such as new heads, are copied from
  the student.
  """
  init, spec = run.config.init, run.spec
  if spec.first_read_steps.get(TEACHER, 0) > 0:
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
  source = open_param_source().read_teacher(
    init.path, step=init.step, spec=spec.model, image="image" in student
  )
  teacher, report = merge_params(
    student,
    source,
    include=include,
    rename=init.rename,
    min_coverage=init.min_coverage,
    optional=_ADAPTERS,
  )
  log.info("Teacher initialised from %s:\n%s", init.path, report)
  return teacher


def read_teacher_params(run: Run) -> dict[str, Any]:
  """Reads frozen teachers that have a path: `{name: {image: ...}}`."""
  abstract, params = run.train_step.abstract.teachers, {}
  for name in abstract:
    entry = run.config.teachers[name]
    if entry.path is None:
      continue
    source, spec = open_param_source(), run.spec.teachers[name].model
    options = dict(weights=entry.weights, step=entry.step, spec=spec)
    image = source.read_params(entry.path, **options)["image"]
    params[name], report = merge_params(
      abstract[name], {"image": image}, min_coverage=1.0
    )
    log.info(f"Teacher {name}, from {source.pin_name(entry.path)}: {report}")
  return params


def fit_statistics(run: Run, state: TrainState) -> TrainState:
  """Returns the state at step 0 with statistics fitted to the first batches.

  They are part of the state, so a resumed run does not fit them again. Uses the
  batches and crops of the first steps, on any mesh. All hosts use the result
  of process 0, since matrix decompositions may differ between hosts.
  """
  spec, train_step = run.spec, run.train_step
  counts = {
    name: -(-objective.num_statistics_examples // run.config.batch_size)
    for name, objective in spec.objectives.items()
    if objective.num_statistics_examples
  }
  if not counts:
    return state
  log.info("Fitting feature statistics to %d batches.", max(counts.values()))
  moments: dict[str, dict[str, Moments]] = {name: {} for name in counts}
  measure = jit_feature_moments(train_step)
  with make_loader(run, 0) as loader:
    for step in range(max(counts.values())):
      batch = shard_batch(next(loader), run.mesh)
      active = tuple(name for name, count in counts.items() if step < count)
      parts = jax.device_get(measure(state, batch, active, np.int32(step)))
      for name, features in parts.items():
        for key, arrays in features.items():
          merge_parts(moments[name], key, arrays)
  fitted = dict(state.statistics)
  for name, feature_moments in moments.items():
    new = spec.objectives[name].fit_statistics(feature_moments)
    fitted[name] = {**fitted[name], **new}
  if jax.process_count() > 1:
    fitted = multihost_utils.broadcast_one_to_all(jax.device_get(fitted))
  statistics = jax.device_put(fitted, train_step.shardings.statistics)
  return state.replace(statistics=statistics)


def merge_parts(moments: dict[str, Moments], key: str, arrays: Any) -> None:
  """Merges the moments of a batch's parts into `moments[key]`.

  `arrays` are count `[parts]`, mean `[parts, d]`, covariance `[parts, d, d]`.
  """
  for part in zip(*map(np.float64, arrays), strict=True):
    new = Moments(float(part[0]), *part[1:])
    moments[key] = moments[key].merge(new) if key in moments else new


def jit_feature_moments(train_step: TrainStep) -> Any:
  """`compute_feature_moments` as `(state, batch, active, step) -> moments`."""

  def compute_moments(spec, state, batch, step):
    state = state.replace(step=step)
    return compute_feature_moments(spec, state, batch, train_step.mesh)

  replicated = replicated_sharding(train_step.mesh)
  return train_step.jit(compute_moments, replicated, replicated)


def compute_feature_moments(
  spec: StepSpec, state: TrainState, batch: Batch, mesh: Mesh | None = None
) -> dict[str, dict[str, tuple[Array, Array, Array]]]:
  """Moments of the features whose statistics the objectives fit.

  By objective and feature: count `[parts]`, mean `[parts, d]` and covariance
  `[parts, d, d]`, for the `spec.accumulate` parts of a batch.
  """

  def compute_moments(part):
    features = compute_statistics_features(spec, state, *part, mesh)
    return {
      name: {key: batch_moments(*pair) for key, pair in pairs.items()}
      for name, pairs in features.items()
    }

  return jax.lax.map(compute_moments, split_batch(spec, state, batch, mesh))


def compute_statistics_features(
  spec: StepSpec,
  state: TrainState,
  batch: Batch,
  keys: Mapping[str, jax.Array],
  mesh: Mesh | None = None,
) -> dict[str, dict[str, tuple[Array, Array]]]:
  """Each objective's `statistics_features`; runs only the frozen teachers."""
  params, state = gather_params(spec, state.params, state, mesh)
  plan = {e: n for e, n in spec.plan.items() if e.weights in spec.teachers}
  batch, fixed = add_views(spec, batch, keys, mesh), state.fixed_params
  encoded = encode(spec, params, fixed, batch, plan=plan, mesh=mesh)
  return {
    name: objective.statistics_features(encoded, batch)
    for name, objective in spec.objectives.items()
  }
