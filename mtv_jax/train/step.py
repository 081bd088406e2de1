"""One update: gradients, optimizer, teacher, averages; compiled for a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from mtv_jax.parallel import constraints, sharding
from mtv_jax.train import gradients, optim
from mtv_jax.train import step_spec as recipe_lib
from mtv_jax.train.state import TrainState
from mtv_jax.train.step_spec import Recipe
from mtv_jax.utils import xla_flags

Metrics = dict[str, Array]


def _still(part: Recipe, whole: Recipe, updates: PyTree) -> PyTree:
  """Leaves what no active objective reads where it is.

  Its gradient is zero, but weight decay would still shrink it.
  """
  used = {e.tower for e in part.plan}
  zeros = functools.partial(jax.tree.map, jnp.zeros_like)
  still = {
    tower: zeros(updates[tower]) for tower in whole.towers if tower not in used
  }
  heads = {
    name: update if name in part.heads else zeros(update)
    for name, update in updates["heads"].items()
  }
  return {**updates, **still, "heads": heads}


def follow(
  part: Recipe, teacher: PyTree, params: PyTree, step: Array
) -> PyTree:
  """The teacher after an update of the student."""
  if not part.has_teacher:
    return teacher
  student = recipe_lib.of_teacher(part, params)
  old = {
    "image": teacher["image"],
    "heads": {name: teacher["heads"][name] for name in student["heads"]},
  }
  new = optim.ema_update(old, student, part.momentum(step))
  return {**new, "heads": {**teacher["heads"], **new["heads"]}}


def make_update(
  whole: Recipe,
  part: Recipe,
  tx: optax.GradientTransformation,
  mesh: Mesh | None = None,
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, Metrics]]:
  """`(state, batch) -> (state, metrics)`, not yet compiled.

  Metrics are scalars by name: `loss`, `grad_norm`, `update_norm`, and for each
  objective `NAME/loss`, `NAME/weight` and what it reports.

  Args:
    whole: the recipe that the state was made for.
    part: the same with the objectives that this update computes.
    tx: the optimizer.
    mesh: that the batch is split over; None on one device.
  """

  def update(state, batch):
    (loss, terms), grads = gradients.compute(part, state, batch, mesh)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    updates = _still(part, whole, updates)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if whole.ema_decay is not None:
      ema = optim.ema_update(ema, params, whole.ema_decay, step=state.step)
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "update_norm": optax.tree.norm(updates),
    }
    statistics = dict(state.statistics)
    for name, term in terms.items():
      statistics[name] = {**statistics[name], **term.statistics}
      metrics[f"{name}/loss"] = term.loss.value()
      metrics[f"{name}/weight"] = part.weights[name](state.step)
      for key, mean in term.report.items():
        metrics[f"{name}/{key}"] = mean.value()
    return TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      teacher=follow(part, state.teacher, params, state.step),
      ema=ema,
      statistics=statistics,
    ), metrics

  return update


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled pieces of training on one mesh.

  Each set of active objectives is a program of its own, compiled when it is
  first run.

  Attributes:
    recipe: with all objectives.
    tx: the optimizer.
    mesh: of all devices.
    abstract: shapes and shardings of the state, to restore into.
  """

  recipe: Recipe
  tx: optax.GradientTransformation
  mesh: Mesh
  abstract: TrainState

  @functools.cached_property
  def _shardings(self) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

  @functools.cached_property
  def _updates(self) -> dict[tuple[str, ...], Any]:
    return {}

  @functools.cached_property
  def _batch(self) -> NamedSharding:
    return NamedSharding(self.mesh, sharding.BATCH)

  def init(self, params: PyTree) -> TrainState:
    """The state at step 0, placed."""
    init = functools.partial(recipe_lib.init_state, self.recipe, self.tx)
    return jax.jit(init, out_shardings=self._shardings)(params)

  def update(
    self,
    state: TrainState,
    batch: Mapping[str, Array],
    active: tuple[str, ...] | None = None,
  ) -> tuple[TrainState, Metrics]:
    """One update; the state is donated.

    Args:
      state: before.
      batch: placed over the mesh.
      active: which objectives to compute; by default all.
    """
    return self.compiled(active)(state, batch)

  def compiled(self, active: tuple[str, ...] | None = None) -> Any:
    """The jitted update of a set of objectives."""
    active = tuple(self.recipe.objectives) if active is None else active
    if active not in self._updates:
      part = self.recipe.only(active)
      self._updates[active] = jax.jit(
        make_update(self.recipe, part, self.tx, self.mesh),
        in_shardings=(self._shardings, self._batch),
        out_shardings=(self._shardings, sharding.replicated(self.mesh)),
        donate_argnums=0,
        compiler_options=xla_flags.compiler_options(self.mesh),
      )
    return self._updates[active]

  @functools.cached_property
  def encoder_norms(self) -> Any:
    """`(state, batch, active) -> {name: norm}`, see `gradients`."""

    def norms(state, batch, active):
      part = self.recipe.only(active)
      return gradients.encoder_norms(part, state, batch, self.mesh)

    return jax.jit(
      norms,
      static_argnums=2,
      in_shardings=(self._shardings, self._batch),
      out_shardings=sharding.replicated(self.mesh),
      compiler_options=xla_flags.compiler_options(self.mesh),
    )

  def restart_teacher(self, state: TrainState) -> TrainState:
    """Makes the teacher a copy of the student; the state is donated.

    For the step at which a teacher is first read.
    """

    def copy(state):
      teacher = recipe_lib.of_teacher(self.recipe, state.params)
      return state.replace(teacher=jax.tree.map(jnp.copy, teacher))

    return jax.jit(copy, out_shardings=self._shardings, donate_argnums=0)(state)


def make_program(
  recipe: Recipe,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  rules: sharding.Rules = (),
) -> Program:
  """Shards the state over the mesh; nothing is compiled yet.

  Args:
    recipe: with all objectives.
    tx: the optimizer.
    mesh: of all devices.
    rules: the config's own, tried before the built-in ones.

  Raises:
    ConfigError: for rules that the layers can't follow.
  """
  constraints.check_in_use(
    recipe_lib.abstract_params(recipe), mesh, rules, keep=gradients.LOOKED_UP
  )
  shapes = jax.eval_shape(
    functools.partial(recipe_lib.init_state, recipe, tx),
    recipe_lib.abstract_params(recipe),
  )
  shardings = sharding.tree_shardings(shapes, mesh, rules)
  abstract = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    shapes,
    shardings,
  )
  return Program(recipe=recipe, tx=tx, mesh=mesh, abstract=abstract)
