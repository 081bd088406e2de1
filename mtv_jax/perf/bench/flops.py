"""FLOPs of a train step: of each of its parts by analysis, and compiled.

The parts are traced one by one, each distinct encoding once, and their matrix
products and convolutions are counted by shape, a loop's as often as it runs.
If the whole step costs no more than their sum, nothing is computed twice; what
XLA says of the compiled step is the judge of that. (XLA counts the body of a
loop once, so the judged step has its layers unrolled.)
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from mtv_jax.config import schema
from mtv_jax.data import tokenizers
from mtv_jax.objectives import base
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.perf.bench.counting import trace
from mtv_jax.train import encodings as encodings_lib
from mtv_jax.train import gradients
from mtv_jax.train.experiment import build_data_ops, build_step_spec
from mtv_jax.train.step import make_program, make_update_fn, update_teacher
from mtv_jax.train.step_spec import StepSpec, abstract_params, init_state
from mtv_jax.utils.errors import check_choice


@dataclasses.dataclass(frozen=True)
class Part:
  """One line of the table; `flops` an image, forward and backward."""

  name: str
  flops: float


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """FLOPs of a train step, an image.

  Attributes:
    parts: each distinct encoding, each objective's heads and loss, the views,
      the optimizer.
    traced: of the whole step, counted as the parts are.
    compiled: of the whole step, as XLA counts its compiled program; None where
      it was not compiled. Unlike the others it includes what is no product.
    alone: by group of objectives, of a step that trains only these.
    batch_size: of the step.
  """

  parts: tuple[Part, ...]
  traced: float
  compiled: float | None
  alone: dict[str, float]
  batch_size: int

  @property
  def total(self) -> float:
    """The sum of the parts."""
    return sum(part.flops for part in self.parts)

  @property
  def share(self) -> float:
    """Of all objectives in one step, against a run for each group."""
    return self.traced / sum(self.alone.values())

  def to_json(self) -> str:
    """As one line of JSON."""
    more = {"total": self.total, "share": self.share}
    return json.dumps({**dataclasses.asdict(self), **more})

  def __str__(self) -> str:
    rows = [(part.name, part.flops) for part in self.parts]
    rows += [("sum of the parts", self.total), ("whole step", self.traced)]
    if self.compiled is not None:
      rows.append(("whole step, compiled (XLA)", self.compiled))
    rows += [(f"alone: {k}", v) for k, v in self.alone.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"GFLOP an image, batch {self.batch_size}"]
    for name, flops in rows:
      share = 100 * flops / self.total
      lines.append(f"{name:{width}}  {flops / 1e9:10.3f}  {share:6.1f} %")
    lines.append(f"one step / runs alone: {100 * self.share:.1f} %")
    if self.compiled is not None:
      over = 100 * (self.compiled / self.total - 1)
      lines.append(f"compiled / sum of the parts: {over:+.2f} %")
    return "\n".join(lines)


def bench_flops(
  config: schema.Config, *, batch_size: int = 64, compile: str = "no"
) -> StepFlops:
  """Counts the step of a config; needs neither its data nor a machine for it.

  Prototypes are taken whole and nothing is rematerialised: what the recipe
  costs, not what it pays to save memory.

  Args:
    config: as `train.run` takes it.
    batch_size: of the counted step; an image's share hardly depends on it.
    compile: see `step_flops`.
  """
  config = schema.check_config(config)
  # A run so long that every objective has started at its end.
  recipe = build_step_spec(config, total_steps=10**9)
  recipe = plain(recipe)
  tokenizer = None
  if config.model.text:
    # Any will do: only the shapes count.
    tokenizer = tokenizers.build_tokenizer("bytes")
  fields = build_data_ops(config, recipe, tokenizer).fields
  batch = {
    name: jax.ShapeDtypeStruct((batch_size, *field.shape), field.dtype)
    for name, field in fields.items()
  }
  return step_flops(recipe, batch, optax.adam(1e-3), compile=compile)


def plain(recipe: StepSpec) -> StepSpec:
  """The recipe without what is done twice to save memory."""
  objectives = {
    name: dataclasses.replace(objective, chunk=None)
    if hasattr(objective, "chunk")
    else objective
    for name, objective in recipe.objectives.items()
  }
  return dataclasses.replace(
    recipe,
    objectives=objectives,
    runtime={**recipe.runtime, "remat": "none"},
    accumulate=1,
  )


def model_flops(
  recipe: StepSpec,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct | jax.Array],
) -> float:
  """FLOPs that a step of this recipe needs, however it is run.

  What the usual share of the peak (MFU) counts: no recomputation. Nothing is
  computed.
  """
  part = plain(recipe)
  update = make_update_fn(part, part, tx)
  return trace(update, _state(part, tx), dict(batch)).flops


def groups(recipe: StepSpec) -> dict[str, tuple[str, ...]]:
  """Objectives as separate runs would train them: DINO and iBOT are one."""
  selfs = tuple(
    name
    for name in recipe.objectives
    if recipe.only((name,)).has_teacher
  )  # fmt: skip
  found = {"+".join(selfs): selfs} if selfs else {}
  return {**{n: (n,) for n in recipe.objectives if n not in selfs}, **found}


def step_flops(
  recipe: StepSpec,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  tx: optax.GradientTransformation,
  *,
  compile: str = "no",
) -> StepFlops:
  """Counts a recipe's step.

  Args:
    recipe: of the step.
    batch: shapes and types of the batch's fields.
    tx: the optimizer.
    compile: `"no"`, or `"whole"` to have XLA count the whole step (two minutes
      for a ViT-L), for one device and with the layers unrolled.
  """
  check_choice("compile", compile, ("no", "whole"))
  rows = batch["image"].shape[0]

  def whole(part):
    return trace(make_update_fn(part, part, tx), _state(part, tx), batch)

  alone = {
    name: whole(recipe.only(members)).flops / rows
    for name, members in groups(recipe).items()
  }
  compiled = _compiled(recipe, batch, tx) / rows if compile == "whole" else None
  return StepFlops(
    parts=tuple(
      Part(name, flops / rows) for name, flops in _parts(recipe, batch, tx)
    ),
    traced=whole(recipe).flops / rows,
    compiled=compiled,
    alone=alone,
    batch_size=rows,
  )


def _state(recipe: StepSpec, tx: optax.GradientTransformation) -> Any:
  return jax.eval_shape(
    functools.partial(init_state, recipe, tx),
    abstract_params(recipe),
  )


def _compiled(recipe: StepSpec, batch: Any, tx: Any) -> float:
  """XLA's count of the compiled step on one device."""
  unrolled = dataclasses.replace(
    recipe, runtime={**recipe.runtime, "scan": False}
  )
  mesh = make_mesh(dict(data=1), jax.devices()[:1])
  program = make_program(unrolled, tx, mesh)
  lowered = program.compiled().lower(program.abstract, batch)
  options = {}
  if jax.default_backend() == "cpu":
    # What is counted is the program before code is made of it.
    options = {"xla_backend_optimization_level": 0}
  return lowered.compile(options).cost_analysis()["flops"]


def _parts(recipe: StepSpec, batch: Any, tx: Any) -> list[tuple[str, float]]:
  """(name, FLOPs of the batch) of everything that a step does, once each."""
  state = _state(recipe, tx)
  rows = batch["image"].shape[0]
  keys = jax.eval_shape(
    lambda: gradients.view_keys(recipe, jnp.zeros((), jnp.int32), rows, None)
  )
  found = []

  def views_of(batch, keys):
    return {
      name: recipe.views[name](
        batch["image"], batch["image_size"], of_rows, recipe.dtype
      )
      for name, of_rows in keys.items()
    }

  for name, of_rows in keys.items():
    cost = trace(views_of, batch, {name: of_rows}).flops
    found.append((f"view {name}", cost))
  views = jax.eval_shape(views_of, batch, keys)

  def encode(plan, params, teacher, views, batch):
    params = gradients.stop_gradient_frozen(recipe, params)
    return encodings_lib.encode(
      plan, recipe.towers, params, teacher, views, batch
    )

  encoded = jax.eval_shape(
    functools.partial(encode, recipe.plan),
    state.params,
    state.teacher,
    views,
    batch,
  )
  loss_inputs = functools.partial(_loss_inputs, recipe)
  heads = state.params["heads"]
  reads = trace(loss_inputs, encoded, heads, state, batch, views).reads
  leaves, tree = jax.tree.flatten(encoded)
  read = jax.tree.unflatten(tree, reads[: len(leaves)])
  for encoding, taps in recipe.plan.items():
    keep = jax.tree.leaves(read[encoding])
    forward = functools.partial(encode, {encoding: taps})
    args = (state.params, state.teacher, views, batch)
    if encoding.weights == base.TEACHER:
      cost = trace(forward, *args, keep=keep).flops
    else:
      cost = _pulled(forward, args, encoded[encoding], keep)
    found.append((str(encoding), cost))
  for name in recipe.objectives:
    found += _objective(recipe.only((name,)), state, encoded, batch, views)

  def finish(state, grads):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return (
      params,
      opt_state,
      update_teacher(recipe, state.teacher, params, state.step),
    )

  found.append(("optimizer", trace(finish, state, state.params).flops))
  return found


def _loss_inputs(recipe, encoded, params, state, batch, views):
  heads = gradients.bind_heads(recipe, params, state)
  return {
    name: objective.loss_inputs(encoded, heads, {**batch, "views": views})
    for name, objective in recipe.objectives.items()
  }


def _pulled(
  forward: Callable[..., PyTree],
  args: tuple,
  outputs: PyTree,
  keep: Sequence[bool],
) -> float:
  """Of a forward pass and pulling gradients through it to the first argument.

  Only through the results that are read.
  """
  kept = [x for x, k in zip(jax.tree.leaves(outputs), keep, strict=True) if k]

  def both(params, rest, cotangents):
    def some(params):
      leaves = jax.tree.leaves(forward(params, *rest))
      return [x for x, k in zip(leaves, keep, strict=True) if k]

    values, pull = jax.vjp(some, params)
    return values, pull(cotangents)

  return trace(both, args[0], args[1:], kept).flops


def _objective(recipe, state, encoded, batch, views):
  """Heads and loss of a recipe of one objective, forward and backward."""
  (name,) = recipe.objectives
  students = {e: encoded[e] for e in recipe.plan if e.weights == base.STUDENT}
  fixed = {e: encoded[e] for e in recipe.plan if e.weights == base.TEACHER}
  params = {key: state.params["heads"][key] for key in recipe.heads}

  def loss_inputs(given, fixed, state, batch, views):
    encoded, heads = given
    return _loss_inputs(
      recipe, {**encoded, **fixed}, heads, state, batch, views
    )

  args = ((students, params), fixed, state, batch, views)
  shapes = jax.eval_shape(loss_inputs, *args)
  leaves, tree = jax.tree.flatten(shapes)
  real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

  def graded(heads, leaves, state):
    def of(heads, floats):
      floats = iter(floats)
      given = [
        next(floats) if r else x for x, r in zip(leaves, real, strict=True)
      ]
      whole = jax.tree.unflatten(tree, given)
      return gradients.compute_losses(recipe, heads, state, whole)[0]

    floats = [x for x, r in zip(leaves, real, strict=True) if r]
    return jax.value_and_grad(of, argnums=(0, 1))(heads, floats)

  return [
    (f"heads of {name}", _pulled(loss_inputs, args, shapes, real)),
    (f"loss of {name}", trace(graded, params, leaves, state).flops),
  ]
