"""The train step: gradients, optimizer, teacher, EMA; compiled for a mesh."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from mtv_jax.parallel.constraints import check_param_rules
from mtv_jax.parallel.mesh import BATCH_SPEC, replicated_sharding
from mtv_jax.parallel.rules import ShardingRules, tree_shardings
from mtv_jax.train import gradients, interference, losses
from mtv_jax.train.state import TrainState
from mtv_jax.train.step_spec import (
  StepSpec,
  abstract_state,
  init_state,
  teacher_params,
)
from mtv_jax.utils import xla_flags

Metrics = dict[str, Array]


def zero_inactive_updates(
  active_spec: StepSpec, spec: StepSpec, updates: PyTree
) -> PyTree:
  """Zeroes the updates of parameters that no active objective reads.

  Their gradients are zero, but weight decay would shrink them.
  """
  zeros = functools.partial(jax.tree.map, jnp.zeros_like)
  inactive = set(spec.towers) - {e.tower for e in active_spec.plan}
  heads = {
    name: update if name in active_spec.heads else zeros(update)
    for name, update in updates["heads"].items()
  }
  towers = {tower: zeros(updates[tower]) for tower in sorted(inactive)}
  return {**updates, **towers, "heads": heads}


def clip_to_bounds(spec: StepSpec, params: PyTree) -> PyTree:
  """Clips the heads' parameters to their bounds, as CLIP its temperature.

  A projection after the optimizer's step: gradients are not clipped.
  """
  heads = dict(params["heads"])
  for name, head in spec.heads.items():
    clipped = {k: jnp.clip(heads[name][k], *b) for k, b in head.bounds.items()}
    heads[name] = {**heads[name], **clipped}
  return {**params, "heads": heads}


def ema_update(
  ema: Any, params: Any, decay: Any, *, step: Any | None = None
) -> Any:
  """One step of the exponential moving average, decay e + (1 - decay) p.

  With `step` the decay is at most (1 + step) / (10 + step), which forgets the
  initialisation. The average keeps its dtypes.
  """
  rate = jnp.asarray(decay, jnp.float32)
  if step is not None:
    rate = jnp.minimum(rate, (1.0 + step) / (10.0 + step))
  return jax.tree.map(
    lambda e, p: (e + (1.0 - rate) * (p - e)).astype(e.dtype), ema, params
  )


def update_teacher(
  active_spec: StepSpec, teacher: PyTree, params: PyTree, step: Array
) -> PyTree:
  """The teacher's EMA step after an update of the student."""
  if not active_spec.has_teacher:
    return teacher
  student, heads = teacher_params(active_spec, params), teacher["heads"]
  old = {**teacher, "heads": {name: heads[name] for name in student["heads"]}}
  new = ema_update(old, student, active_spec.momentum(step))
  return {**new, "heads": {**heads, **new["heads"]}}


def make_update_fn(
  spec: StepSpec,
  active_spec: StepSpec,
  tx: optax.GradientTransformation,
  mesh: Mesh | None = None,
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, Metrics]]:
  """`(state, batch) -> (state, metrics)`, not yet compiled.

  Metrics are scalars by name: `loss`, `grad_norm`, `update_norm`, `skipped`,
  and for each objective `NAME/loss`, `NAME/weight` and what it reports.

  Where the loss or gradient is not finite, `skipped` is 1 and the new state is
  the old one, but for its step.

  `spec` has all objectives, as the state; `active_spec` those that this update
  computes.
  """

  def update(state, batch):
    (loss, terms), grads = gradients.compute_gradients(
      active_spec, state, batch, mesh
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    updates = zero_inactive_updates(active_spec, spec, updates)
    params = optax.apply_updates(state.params, updates)
    params = clip_to_bounds(active_spec, params)
    ema = state.ema
    if spec.ema_decay is not None:
      ema = ema_update(ema, params, spec.ema_decay, step=state.step)
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "update_norm": optax.tree.norm(updates),
    }
    weights = active_spec.loss_weights(state)
    statistics = dict(state.statistics)
    for name, term in terms.items():
      statistics[name] = {**statistics[name], **term.statistics}
      metrics[f"{name}/loss"] = term.loss.value()
      metrics[f"{name}/weight"] = weights[name]
      for key, mean in term.report.items():
        metrics[f"{name}/{key}"] = mean.value()
    # Known before the update, so that no second state has to wait for it.
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["skipped"] = 1.0 - finite
    new = TrainState(
      step=state.step,
      params=params,
      opt_state=opt_state,
      teacher=update_teacher(active_spec, state.teacher, params, state.step),
      ema=ema,
      statistics=statistics,
      teachers=state.teachers,
      balance=spec.balance.update(
        state.balance,
        {name: term.loss for name, term in terms.items()},
        active_spec.config_weights(state.step),
      ),
    )
    new = jax.tree.map(functools.partial(jnp.where, finite), new, state)
    return new.replace(step=state.step + 1), metrics

  return update


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled functions of training on one mesh.

  The update of each set of active objectives is compiled when it first runs.
  `abstract` has the shapes and shardings of the state.
  """

  spec: StepSpec
  tx: optax.GradientTransformation
  mesh: Mesh
  abstract: TrainState
  _updates: dict[tuple[str, ...], Any] = dataclasses.field(
    default_factory=dict, init=False
  )

  @functools.cached_property
  def shardings(self) -> TrainState:
    """The sharding of each array of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

  def _jit(
    self, function: Any, outputs: Any, *inputs: Any, **options: Any
  ) -> Any:
    """Jits a function of the state, a batch and arrays sharded as `inputs`."""
    split = NamedSharding(self.mesh, BATCH_SPEC)
    return jax.jit(
      function,
      in_shardings=(self.shardings, split, *inputs),
      out_shardings=outputs,
      compiler_options=xla_flags.compiler_options(self.mesh),
      **options,
    )

  def init(
    self,
    params: PyTree,
    teachers: Mapping[str, PyTree] = types.MappingProxyType({}),
    teacher: PyTree | None = None,
  ) -> TrainState:
    """The sharded state at step 0; arguments as of `init_state`."""
    init = functools.partial(init_state, self.spec, self.tx)
    jitted = jax.jit(init, out_shardings=self.shardings)
    return jitted(params, dict(teachers), teacher)

  def update(
    self,
    state: TrainState,
    batch: Mapping[str, Array],
    active: tuple[str, ...] | None = None,
  ) -> tuple[TrainState, Metrics]:
    """One update of the `active` objectives, all by default.

    The state is donated; the batch is sharded over the mesh.
    """
    return self.jitted_update(active)(state, batch)

  def jitted_update(self, active: tuple[str, ...] | None = None) -> Any:
    """The jitted update of a set of objectives."""
    active = tuple(self.spec.objectives) if active is None else active
    if active not in self._updates:
      self._updates[active] = self._jit(
        make_update_fn(
          self.spec, self.spec.select_objectives(active), self.tx, self.mesh
        ),
        (self.shardings, replicated_sharding(self.mesh)),
        donate_argnums=0,
      )
    return self._updates[active]

  @functools.cached_property
  def encoder_grad_norms(self) -> Any:
    """`(state, batch, active) -> {name: norm}`, see `gradients`."""

    def norms(state, batch, active):
      spec = self.spec.select_objectives(active)
      return gradients.compute_encoder_grad_norms(spec, state, batch, self.mesh)

    return self._jit(norms, replicated_sharding(self.mesh), static_argnums=2)

  @functools.cached_property
  def feature_moments(self) -> Any:
    """`(state, batch, step, active) -> moments`, see `gradients`."""

    def moments(state, batch, step, active):
      spec = self.spec.select_objectives(active)
      state = state.replace(step=step)
      return gradients.compute_feature_moments(spec, state, batch, self.mesh)

    replicated = replicated_sharding(self.mesh)
    return self._jit(moments, replicated, replicated, static_argnums=3)

  @functools.cached_property
  def interference(self) -> Any:
    """`(state, batch, active, lr) -> arrays`, see `measure_interference`.

    A learning rate of None leaves out the transfer.
    """

    def measure(state, batch, active, lr=None):
      spec = self.spec.select_objectives(active)
      return interference.measure_interference(
        spec, state, batch, lr, self.mesh
      )

    replicated = replicated_sharding(self.mesh)
    return self._jit(measure, replicated, replicated, static_argnums=2)

  @functools.cached_property
  def _balance_update(self) -> Any:
    def update(balance, norms, step):
      weights = self.spec.config_weights(step)
      return self.spec.balance.observe(balance, norms, weights, step)

    return jax.jit(update, out_shardings=self.shardings.balance)

  def update_balance(
    self, state: TrainState, norms: Mapping[str, Array]
  ) -> TrainState:
    """The state after a measurement of `encoder_grad_norms`."""
    balance = self._balance_update(state.balance, norms, state.step)
    return state.replace(balance=balance)

  def restart_teacher(self, state: TrainState) -> TrainState:
    """Copies the student to the teacher before its first use, in place."""

    def copy(state):
      teacher = teacher_params(self.spec, state.params)
      return state.replace(teacher=jax.tree.map(jnp.copy, teacher))

    return jax.jit(copy, out_shardings=self.shardings, donate_argnums=0)(state)

  def update_teachers(
    self, state: TrainState, names: tuple[str, ...]
  ) -> TrainState:
    """Copies the EMA teacher's image encoder to frozen teachers, in place."""

    def copy(state):
      # A teacher of heads alone has the student's encoder.
      image = {**state.params, **state.teacher}["image"]
      new = {name: {"image": jax.tree.map(jnp.copy, image)} for name in names}
      return state.replace(teachers={**state.teachers, **new})

    return jax.jit(copy, out_shardings=self.shardings, donate_argnums=0)(state)


def make_program(
  spec: StepSpec,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  rules: ShardingRules = (),
) -> Program:
  """The train step for a mesh; nothing is compiled yet.

  Sharding `rules` of the config precede the built-in ones.

  Raises:
    ConfigError: for sharding rules that the layers can't follow.
  """
  shapes = abstract_state(spec, tx)
  check_param_rules(shapes.params, mesh, rules, keep=losses.EMBEDDING_TABLES)
  abstract = jax.tree.map(
    lambda leaf, sharding: leaf.update(sharding=sharding),
    shapes,
    tree_shardings(shapes, mesh, rules),
  )
  return Program(spec=spec, tx=tx, mesh=mesh, abstract=abstract)
