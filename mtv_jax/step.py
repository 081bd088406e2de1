"""One update: views, encodings, objectives, gradients, optimizer, teacher."""

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

from mtv_jax import encodings, optim, sharding
from mtv_jax import views as views_lib
from mtv_jax.config import ConfigError
from mtv_jax.models import model as model_lib
from mtv_jax.objectives import base
from mtv_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a config builds, and all that the step is made of.

  Attributes:
    spec: shapes of the towers.
    dtype: compute dtype; parameters and losses stay float32.
    runtime: further options of the towers that don't change what they compute
      (`remat`, `scan`).
    objectives: by name.
    weights: of each objective in the total.
    views: by name.
    seed: of everything random in the step.
    total_steps: of the run, for schedules.
    teacher_momentum: of the EMA that is the teacher.
    ema_decay: of the EMA of all parameters; None for none.
  """

  spec: model_lib.ModelSpec
  dtype: Any
  objectives: Mapping[str, base.Objective]
  weights: Mapping[str, float]
  views: Mapping[str, views_lib.View]
  seed: int
  total_steps: int
  runtime: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  teacher_momentum: float = 0.996
  ema_decay: float | None = None

  def __post_init__(self):
    if not self.objectives:
      raise ConfigError(
        "config.objectives is empty: nothing would be trained. Add one, such "
        "as contrastive=dict(weight=1.0)."
      )
    for encoding in self.plan:
      if encoding.tower == "image" and encoding.view not in self.views:
        raise ConfigError(
          f"an objective reads the view {encoding.view!r}, which config.views "
          f"lacks; there are: {sorted(self.views)}."
        )
      if encoding.tower == "text" and self.spec.text is None:
        raise ConfigError(
          "an objective reads text, but config.model.text is not set."
        )

  @functools.cached_property
  def plan(self) -> dict[base.Encoding, tuple[int, ...]]:
    """The distinct encodings, with their taps."""
    return encodings.collect(self.objectives.values())

  @functools.cached_property
  def heads(self) -> dict[str, base.Head]:
    """All heads of all objectives, by their global names."""
    heads: dict[str, base.Head] = {}
    for name, objective in self.objectives.items():
      for key, head in objective.heads().items():
        if key in heads and heads[key].module != head.module:
          raise ConfigError(
            f"objective {name!r} and another one both own heads/{key}, with "
            "different settings. Give one of them another head."
          )
        heads[key] = head
    return heads

  @functools.cached_property
  def towers(self) -> dict[str, Any]:
    """The linen modules, `image` and, where there is one, `text`."""
    options = dict(dtype=self.dtype, **self.runtime)
    towers = {"image": model_lib.image_tower(self.spec, **options)}
    if self.spec.text is not None:
      towers["text"] = model_lib.text_tower(self.spec, **options)
    return towers

  @property
  def has_teacher(self) -> bool:
    """Whether an objective reads a teacher's encoding."""
    return any(e.weights == base.TEACHER for e in self.plan)

  def fields(self) -> dict[str, list[str]]:
    """Batch fields by name, each with the objectives that read it."""
    readers: dict[str, list[str]] = {}
    for name, objective in self.objectives.items():
      for field in objective.needs().fields:
        readers.setdefault(field, []).append(name)
    return readers


def _of_teacher(recipe: Recipe, params: Mapping[str, PyTree]) -> PyTree:
  """The part of the parameters that the teacher follows."""
  if not recipe.has_teacher:
    return {}
  followed = [name for name, head in recipe.heads.items() if head.teacher]
  return {
    "image": params["image"],
    "heads": {name: params["heads"][name] for name in followed},
  }


def _zeros(value: Any) -> Any:
  if isinstance(value, jax.ShapeDtypeStruct):
    return jnp.zeros(value.shape, value.dtype)
  return value


def init_params(recipe: Recipe, rng: jax.Array) -> PyTree:
  """Parameters `{image, text, heads}`, float32."""
  tower_rng, head_rng = jax.random.split(rng)
  params = dict(model_lib.init_params(recipe.spec, tower_rng))
  params["heads"] = {}
  for i, (name, head) in enumerate(sorted(recipe.heads.items())):
    example = [_zeros(x) for x in head.example(recipe.spec)]
    variables = head.module.init(jax.random.fold_in(head_rng, i), *example)
    params["heads"][name] = variables["params"]
  return params


def init_state(
  recipe: Recipe, tx: optax.GradientTransformation, params: PyTree
) -> TrainState:
  """The state at step 0: the teacher and the EMA start as copies."""
  copy = functools.partial(jax.tree.map, jnp.copy)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    teacher=copy(_of_teacher(recipe, params)),
    ema=copy(params) if recipe.ema_decay is not None else {},
    statistics={
      name: objective.initial_statistics()
      for name, objective in recipe.objectives.items()
    },
  )


def total_loss(
  recipe: Recipe,
  params: PyTree,
  state: TrainState,
  batch: Mapping[str, Array],
) -> tuple[Array, dict[str, base.Terms]]:
  """The weighted sum of the objectives' losses, and each one's terms."""
  size = batch["image"].shape[0]
  seed = jax.random.key(recipe.seed)
  views = {}
  for name in sorted({e.view for e in recipe.plan if e.tower == "image"}):
    keys = views_lib.row_keys(seed, name, state.step, size)
    with jax.named_scope(f"view({name})"):
      views[name] = recipe.views[name](
        batch["image"], batch["image_size"], keys, recipe.dtype
      )
  encoded = encodings.encode(
    recipe.plan, recipe.towers, params, state.teacher, views, batch
  )
  heads = base.BoundHeads(
    recipe.heads,
    params["heads"],
    jax.lax.stop_gradient(state.teacher.get("heads", {})),
  )
  inputs = {**batch, "views": views}
  total, terms = jnp.zeros(()), {}
  for name, objective in recipe.objectives.items():
    with jax.named_scope(name):
      evidence = objective.evidence(encoded, heads, inputs)
      context = base.Context(
        state.step, recipe.total_steps, state.statistics[name]
      )
      terms[name] = objective.loss(evidence, heads, context)
    total = total + recipe.weights[name] * terms[name].loss.value()
  return total, terms


def make_update(
  recipe: Recipe, tx: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
  """`(state, batch) -> (state, metrics)`, not yet compiled.

  Metrics are scalars by name: `loss`, `grad_norm`, `update_norm`, and for each
  objective `NAME/loss`, `NAME/weight` and what it reports.
  """

  def update(state, batch):
    gradient = jax.value_and_grad(
      lambda params: total_loss(recipe, params, state, batch), has_aux=True
    )
    (loss, terms), grads = gradient(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if recipe.ema_decay is not None:
      ema = optim.ema_update(ema, params, recipe.ema_decay)
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "update_norm": optax.tree.norm(updates),
    }
    for name, term in terms.items():
      metrics[f"{name}/loss"] = term.loss.value()
      metrics[f"{name}/weight"] = jnp.asarray(recipe.weights[name])
      for key, mean in term.report.items():
        metrics[f"{name}/{key}"] = mean.value()
    return TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      teacher=optim.ema_update(
        state.teacher, _of_teacher(recipe, params), recipe.teacher_momentum
      ),
      ema=ema,
      statistics={
        name: {**state.statistics[name], **term.statistics}
        for name, term in terms.items()
      },
    ), metrics

  return update


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled pieces of training on one mesh.

  Attributes:
    init: `(params) -> state`, placed.
    update: `(state, batch) -> (state, metrics)`; the state is donated.
    abstract: shapes and shardings of the state, to restore into.
  """

  init: Callable[[PyTree], TrainState]
  update: Callable[..., tuple[TrainState, dict[str, Array]]]
  abstract: TrainState


def abstract_params(recipe: Recipe) -> PyTree:
  """Shapes and dtypes of the parameters; computes nothing."""
  return jax.eval_shape(
    functools.partial(init_params, recipe), jax.random.key(0)
  )


def make_program(
  recipe: Recipe,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  rules: sharding.Rules = (),
) -> Program:
  """Shards the state over the mesh and jits `init` and `update` on it."""
  shapes = jax.eval_shape(
    functools.partial(init_state, recipe, tx), abstract_params(recipe)
  )
  shardings = sharding.tree_shardings(shapes, mesh, rules)
  abstract = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    shapes,
    shardings,
  )
  return Program(
    init=jax.jit(
      functools.partial(init_state, recipe, tx), out_shardings=shardings
    ),
    update=jax.jit(
      make_update(recipe, tx),
      in_shardings=(shardings, NamedSharding(mesh, sharding.BATCH)),
      out_shardings=(shardings, sharding.replicated(mesh)),
      donate_argnums=0,
    ),
    abstract=abstract,
  )
