"""The train step: gradients, optimizer, EMA, teacher and balance updates."""

import dataclasses
import functools
import logging
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from mtv_jax.objectives.base import TEACHER
from mtv_jax.parallel.mesh import BATCH_SPEC, replicated_sharding
from mtv_jax.parallel.rules import (
  ShardingRules,
  check_param_rules,
  tree_shardings,
)
from mtv_jax.train.forward import EMBEDDING_TABLES
from mtv_jax.train.gradients import compute_gradients
from mtv_jax.train.spec import (
  StepSpec,
  TrainState,
  abstract_state,
  init_state,
  teacher_params,
)
from mtv_jax.utils import xla_flags

log = logging.getLogger(__name__)

Metrics = dict[str, Array]
TermsByObjective = Mapping[str, Any]  # `objectives.base.Terms` by objective.
# (state after the optimizer, state before it, terms) -> state
StateUpdate = Callable[[TrainState, TrainState, TermsByObjective], TrainState]


def make_update_fn(
  spec: StepSpec,
  active_spec: StepSpec,
  tx: optax.GradientTransformation,
  mesh: Mesh | None = None,
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, Metrics]]:
  """Makes `(state, batch) -> (state, metrics)`, not yet compiled.

  Metrics are scalars by name: `loss`, `grad_norm`, `update_norm`, `skipped`,
  and for each objective `NAME/loss`, `NAME/weight` and its `Terms.report`.

  If the loss or gradient is non-finite, `skipped` is 1 and only the state's
  step changes.

  `spec` has all objectives, like the state; `active_spec` has the objectives
  that this update computes.
  """
  inactive = list_inactive_modules(spec, active_spec)
  tx = optax.with_extra_args_support(tx)
  state_updates = make_state_updates(spec, active_spec)

  def update(state, batch):
    (loss, terms), grads = compute_gradients(active_spec, state, batch, mesh)
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, inactive=inactive
    )
    new = state.replace(
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      statistics=dict(state.statistics),
    )
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "update_norm": optax.tree.norm(updates),
    }
    weights = active_spec.loss_weights(state)
    for name, term in terms.items():
      new.statistics[name] = {**new.statistics[name], **term.statistics}
      metrics[f"{name}/loss"] = term.loss.value()
      metrics[f"{name}/weight"] = weights[name]
      for key, mean in term.report.items():
        metrics[f"{name}/{key}"] = mean.value()
    for update_state in state_updates:
      new = update_state(new, state, terms)
    # Independent of the update, so XLA need not keep both states to decide.
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["skipped"] = 1.0 - finite
    new = jax.tree.map(functools.partial(jnp.where, finite), new, state)
    return new.replace(step=state.step + 1), metrics

  return update


@dataclasses.dataclass(frozen=True)
class StepFunction:
  """A jitted function of the active objectives, a state and a batch.

  The seed is an argument of the compiled program: runs that differ in the seed
  alone share it in a compilation cache.
  """

  train_step: "TrainStep"
  # `(active, seed, state, batch, *arrays) -> result`; active is static.
  jitted: Any

  def __call__(
    self,
    state: TrainState,
    batch: Any,
    active: tuple[str, ...] | None = None,
    *arrays: Any,
  ) -> Any:
    """Computes the `active` objectives, by default all."""
    active = self._select(active)
    return self.jitted(active, self.train_step.seed, state, batch, *arrays)

  def lower(
    self,
    state: TrainState,
    batch: Any,
    active: tuple[str, ...] | None = None,
    *arrays: Any,
  ) -> jax.stages.Lowered:
    """Lowers the function, also for devices of a topology."""
    sharding = replicated_sharding(self.train_step.mesh)
    seed = jax.ShapeDtypeStruct((), np.uint32, sharding=sharding)
    active = self._select(active)
    return self.jitted.lower(active, seed, state, batch, *arrays)

  def _select(self, active: tuple[str, ...] | None) -> tuple[str, ...]:
    return tuple(self.train_step.spec.objectives) if active is None else active


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """The compiled functions of training on one mesh."""

  spec: StepSpec
  tx: optax.GradientTransformation
  mesh: Mesh
  abstract: TrainState  # Shapes and shardings of the state.
  flags: str = ""  # Compiler flags, see `xla_flags.parse_flags`.

  @functools.cached_property
  def shardings(self) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

  @functools.cached_property
  def seed(self) -> Array:
    """The run's seed, on all devices."""
    seed, sharding = np.uint32(self.spec.seed), replicated_sharding(self.mesh)
    return jax.make_array_from_callback((), sharding, lambda _: seed)

  @functools.cached_property
  def update(self) -> StepFunction:
    """`(state, batch, active) -> (state, metrics)`, jitted.

    Updates the `active` objectives, by default all; compiles once per set of
    objectives. Donates the state; the batch is sharded over the mesh.
    """

    def update(active_spec, state, batch):
      update_fn = make_update_fn(self.spec, active_spec, self.tx, self.mesh)
      return update_fn(state, batch)

    out_shardings = self.shardings, replicated_sharding(self.mesh)
    return self.jit(update, out_shardings, donates_state=True)

  def jit(
    self,
    function: Callable[..., Any],
    out_shardings: Any,
    *in_shardings: Any,
    donates_state: bool = False,
  ) -> StepFunction:
    """Jits `(spec, state, batch, *arrays) -> result`.

    `spec` has the active objectives, and its seed is an argument of the
    program. `in_shardings` are the shardings of the further arrays.
    """

    def run(active, seed, state, batch, *arrays):
      spec = dataclasses.replace(self.spec, seed=seed)
      spec = spec.select_objectives(active)
      return function(spec, state, batch, *arrays)

    run.__name__ = function.__name__  # The name of the program.
    replicated = replicated_sharding(self.mesh)
    batch_sharding = NamedSharding(self.mesh, BATCH_SPEC)
    jitted = jax.jit(
      run,
      static_argnums=0,
      donate_argnums=2 if donates_state else (),
      in_shardings=(replicated, self.shardings, batch_sharding, *in_shardings),
      out_shardings=out_shardings,
      compiler_options=xla_flags.compiler_options(self.mesh, self.flags),
    )
    return StepFunction(self, jitted)

  def init(
    self,
    params: PyTree,
    teachers: Mapping[str, PyTree] = types.MappingProxyType({}),
    teacher: PyTree | None = None,
  ) -> TrainState:
    """The sharded state at step 0; see `init_state` for the arguments."""
    init = functools.partial(init_state, self.spec, self.tx)
    options = xla_flags.compiler_options(self.mesh, runs_once=True)
    jitted = jax.jit(
      init, out_shardings=self.shardings, compiler_options=options
    )
    return jitted(params, dict(teachers), teacher)

  def copy_teachers(self, state: TrainState, step: int) -> TrainState:
    """Copies the teachers due after `step` updates; if any, donates `state`.

    An EMA teacher that is first read after step 0 starts as a copy of the
    student at that step. Snapshot teachers are copies of the EMA teacher; some
    are refreshed every few updates.
    """
    spec, starts = self.spec, self.spec.first_read_steps
    starts_ema = step > 0 and starts.get(TEACHER) == step
    names = [n for n, t in spec.teachers.items() if t.due(step - starts[n])]
    if not names and not starts_ema:
      return state
    if names:
      log.info(f"Step {step + 1} copies the EMA teacher to {', '.join(names)}.")

    def copy(state):
      if starts_ema:
        teacher = teacher_params(spec, state.params)
        state = state.replace(teacher=jax.tree.map(jnp.copy, teacher))
      # A teacher with heads only uses the student's encoder.
      image = {**state.params, **state.teacher}["image"]
      image = spec.merge_adapters(image)
      new = {name: {"image": jax.tree.map(jnp.copy, image)} for name in names}
      return state.replace(teachers={**state.teachers, **new})

    options = dict(out_shardings=self.shardings, donate_argnums=0)
    return jax.jit(copy, **options)(state)


def make_train_step(
  spec: StepSpec,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  rules: ShardingRules = (),
  flags: str = "",
) -> TrainStep:
  """Builds the train step for a mesh; does not compile.

  Sharding `rules` of the config precede the built-in ones. `flags` are
  `config.xla_flags`.
  """
  shapes = abstract_state(spec, tx)
  check_param_rules(shapes.params, mesh, rules, keep=EMBEDDING_TABLES)
  abstract = jax.tree.map(
    lambda leaf, sharding: leaf.update(sharding=sharding),
    shapes,
    tree_shardings(shapes, mesh, rules),
  )
  return TrainStep(spec=spec, tx=tx, mesh=mesh, abstract=abstract, flags=flags)


def make_state_updates(
  spec: StepSpec, active_spec: StepSpec
) -> list[StateUpdate]:
  """Lists the state updates after the optimizer's step, in order."""
  has_bounds = any(head.bounds for head in active_spec.heads.values())
  updates = [
    (has_bounds, clip_to_bounds),
    (spec.has_ema, update_ema),
    (active_spec.has_teacher, update_teacher),
    (spec.has_balance, update_balance),
  ]
  return [
    functools.partial(update, active_spec)
    for is_used, update in updates
    if is_used
  ]


def list_inactive_modules(spec: StepSpec, active_spec: StepSpec) -> list[str]:
  """Modules (`image`, `text`, `heads/NAME`) that no active objective reads."""
  towers = {"image", "text"} if spec.model.text else {"image"}
  heads = spec.heads.keys() - active_spec.heads.keys()
  towers -= {encoding.tower for encoding in active_spec.plan}
  return sorted(towers | {f"heads/{name}" for name in heads})


def clip_to_bounds(
  spec: StepSpec, new: TrainState, old: TrainState, terms: TermsByObjective
) -> TrainState:
  """Clips the heads' parameters to their bounds, like CLIP's temperature.

  Projects after the optimizer's step; does not clip gradients.
  """
  del old, terms
  heads = dict(new.params["heads"])
  for name, head in spec.heads.items():
    clipped = {k: jnp.clip(heads[name][k], *b) for k, b in head.bounds.items()}
    heads[name] = {**heads[name], **clipped}
  return new.replace(params={**new.params, "heads": heads})


def ema_update(
  ema: Any, params: Any, decay: Any, *, step: Any | None = None
) -> Any:
  """One step of an exponential moving average, decay e + (1 - decay) p.

  If `step` is given, the decay is at most (1 + step) / (10 + step), which
  forgets the initialisation. Preserves the dtypes of `ema`.
  """
  rate = jnp.asarray(decay, jnp.float32)
  if step is not None:
    rate = jnp.minimum(rate, (1.0 + step) / (10.0 + step))
  return jax.tree.map(
    lambda e, p: (e + (1.0 - rate) * (p - e)).astype(e.dtype), ema, params
  )


def update_ema(
  spec: StepSpec, new: TrainState, old: TrainState, terms: TermsByObjective
) -> TrainState:
  """Updates the average of all parameters, for evaluation and export."""
  del terms
  if spec.eval_params is not None:
    return new.replace(ema=spec.eval_params(new.opt_state, new.params))
  ema = ema_update(old.ema, new.params, spec.ema_decay, step=old.step)
  return new.replace(ema=ema)


def update_teacher(
  spec: StepSpec, new: TrainState, old: TrainState, terms: TermsByObjective
) -> TrainState:
  """Updates the EMA teacher after an update of the student."""
  del terms
  student, heads = teacher_params(spec, new.params), old.teacher["heads"]
  subset = {**old.teacher, "heads": {n: heads[n] for n in student["heads"]}}
  teacher = ema_update(subset, student, spec.momentum(old.step))
  heads = {**heads, **teacher["heads"]}
  return new.replace(teacher={**teacher, "heads": heads})


def update_balance(
  spec: StepSpec, new: TrainState, old: TrainState, terms: TermsByObjective
) -> TrainState:
  """Updates the balancing method's state from the objectives' losses."""
  losses = {name: term.loss for name, term in terms.items()}
  weights = spec.config_weights(old.step)
  balance = spec.balance.update(old.balance, losses, weights)
  return new.replace(balance=balance)
