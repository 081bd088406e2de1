"""FLOPs of a train step: of each part analytically, and of the compiled step.

`count` traces a function and adds up its matrix products and convolutions by
shape. `step_flops` traces the parts of a step one by one, each encoding once.
If the whole step costs no more than their sum, nothing is computed twice.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.sharding import Mesh
from jaxtyping import PyTree

from mtv_jax.config import schema
from mtv_jax.data import ops, tokenizers
from mtv_jax.objectives import base
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.perf import hlo
from mtv_jax.train import encodings as encodings_lib
from mtv_jax.train import gradients
from mtv_jax.train.experiment import build_step_spec
from mtv_jax.train.step import make_program, make_update_fn, update_teacher
from mtv_jax.train.step_spec import StepSpec, abstract_params, init_state
from mtv_jax.utils.errors import check_choice

# ---------------------------------------------------------------------------
# Counting a traced function.


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost of a traced function.

  Attributes:
    flops: of its matrix products and convolutions.
    reads: for each leaf of the arguments, whether the results depend on it.
  """

  flops: float
  reads: list[bool]


def count(
  function: Callable[..., PyTree], *args: PyTree, keep: Sequence[bool] = ()
) -> Cost:
  """Counts the FLOPs of a function from its jaxpr; computes nothing.

  As a compiler would: dead code is free, repeated code counts once, and the
  body of a loop counts as often as it runs.

  Args:
    function: of arrays.
    args: arrays or `jax.ShapeDtypeStruct`s.
    keep: which leaves of the result are needed; all by default.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return Cost(*_count_live(jaxpr, list(keep or [True] * len(jaxpr.outvars))))


def _count_live(jaxpr: Any, keep: list[bool]) -> tuple[float, list[bool]]:
  """FLOPs that the needed results cost, and which inputs they read."""
  first = _common_subexpressions(jaxpr)

  def variables(names, needed):
    return {
      first.get(var, var)
      for var, need in zip(names, needed, strict=True)
      if need and not isinstance(var, core.Literal)
    }

  live, total = variables(jaxpr.outvars, keep), 0.0
  for eqn in reversed(jaxpr.eqns):
    needed = [var in live for var in eqn.outvars]
    if any(needed) or eqn.effects:
      flops, reads = _count_equation(eqn, needed)
      total += flops
      live |= variables(eqn.invars, reads)
  return total, [var in live for var in jaxpr.invars]


def _common_subexpressions(jaxpr: Any) -> dict[Any, Any]:
  """Variables of repeated operations, each with its first equal variable."""
  equations: dict[Any, Any] = {}
  first: dict[Any, Any] = {}
  for eqn in jaxpr.eqns:
    inputs = tuple(
      ("literal", str(var), str(var.aval))
      if isinstance(var, core.Literal)
      else first.get(var, var)
      for var in eqn.invars
    )
    # Callables are those of a custom derivative: new objects at every call, and
    # without effect after differentiation.
    params = tuple(
      (key, _identity(value))
      for key, value in sorted(eqn.params.items())
      if not callable(value)
    )
    known = equations.setdefault((eqn.primitive, inputs, params), eqn)
    if known is not eqn and not eqn.effects:
      first.update(zip(eqn.outvars, known.outvars, strict=True))
  return first


def _identity(param: Any) -> Any:
  # Jaxprs of equal text are equal, except for their constants.
  if _is_jaxpr(param) and getattr(param, "consts", None):
    return id(param)
  return str(param)


def _is_jaxpr(x: Any) -> bool:
  return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def _count_equation(eqn: Any, needed: list[bool]) -> tuple[float, list[bool]]:
  """FLOPs of one operation, and which of its inputs it reads."""
  every = [True] * len(eqn.invars)
  name = eqn.primitive.name
  if name == "dot_general":
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    inner = math.prod(shape[i] for i in contract)
    return 2.0 * eqn.outvars[0].aval.size * inner, every
  if name == "conv_general_dilated":
    return _convolution_flops(eqn), every
  bodies = [
    x.jaxpr if isinstance(x, core.ClosedJaxpr) else x
    for x in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr)
    if _is_jaxpr(x)
  ]
  if len(bodies) == 1 and name not in ("scan", "while", "cond"):
    (body,) = bodies
    if len(body.invars) == len(every) and len(body.outvars) == len(needed):
      return _count_live(body, needed)
  if bodies and name == "cond":
    costs, reads = zip(*(_count_live(b, needed) for b in bodies), strict=True)
    return max(costs), [True, *map(any, zip(*reads, strict=True))]
  # A loop needs all of its results: the next iteration reads them.
  costs = [_count_live(body, [True] * len(body.outvars))[0] for body in bodies]
  return sum(costs, 0.0) * eqn.params.get("length", 1), every


def _convolution_flops(eqn: Any) -> float:
  """Two FLOPs for each output and each tap that reads an input."""
  numbers = eqn.params["dimension_numbers"]
  left, right = (v.aval.shape for v in eqn.invars[:2])
  out = eqn.outvars[0].aval.shape
  taps = 1
  for i, (low, _) in enumerate(eqn.params["padding"]):
    taps *= hlo.count_valid_taps(
      left[numbers.lhs_spec[2 + i]],
      right[numbers.rhs_spec[2 + i]],
      out[numbers.out_spec[2 + i]],
      padding=low,
      stride=eqn.params["window_strides"][i],
      lhs_dilation=eqn.params["lhs_dilation"][i],
      rhs_dilation=eqn.params["rhs_dilation"][i],
    )
  outputs = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
  return 2.0 * taps * outputs * right[numbers.rhs_spec[1]]


# ---------------------------------------------------------------------------
# A train step.


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """FLOPs of a train step per image.

  Attributes:
    parts: by name, forward and backward: each encoding, each objective's heads
      and loss, the views, the optimizer.
    traced: of the whole step, counted like the parts.
    compiled: of the whole step, by XLA's cost analysis, which includes
      elementwise operations; None where it was not compiled.
    alone: by group of objectives, of a step that trains only these.
    batch_size: of the step.
  """

  parts: dict[str, float]
  traced: float
  compiled: float | None
  alone: dict[str, float]
  batch_size: int

  @property
  def total(self) -> float:
    """The sum of the parts."""
    return sum(self.parts.values())

  @property
  def share(self) -> float:
    """One step with all objectives over one step for each group."""
    return self.traced / sum(self.alone.values())

  def to_json(self) -> str:
    """As one line of JSON."""
    parts = [dict(name=name, flops=flops) for name, flops in self.parts.items()]
    more = dict(parts=parts, total=self.total, share=self.share)
    return json.dumps({**dataclasses.asdict(self), **more})

  def __str__(self) -> str:
    rows = dict(self.parts)
    rows |= {"sum of the parts": self.total, "whole step": self.traced}
    if self.compiled is not None:
      rows["whole step, compiled (XLA)"] = self.compiled
    rows |= {f"alone: {k}": v for k, v in self.alone.items()}
    width = max(map(len, rows))
    lines = [f"GFLOP an image, batch {self.batch_size}"]
    for name, flops in rows.items():
      share = 100 * flops / self.total
      lines.append(f"{name:{width}}  {flops / 1e9:10.3f}  {share:6.1f} %")
    lines.append(f"one step / runs alone: {100 * self.share:.1f} %")
    if self.compiled is not None:
      over = 100 * (self.compiled / self.total - 1)
      lines.append(f"compiled / sum of the parts: {over:+.2f} %")
    return "\n".join(lines)


def run(
  config: schema.Config, *, batch_size: int = 64, compile: str = "no"
) -> StepFlops:
  """Counts the train step of a config; opens no data, needs no accelerator.

  The recipe's own cost: prototypes in one chunk, nothing rematerialised.

  Args:
    config: as `train` takes it.
    batch_size: of the counted step; the cost per image hardly depends on it.
    compile: "no", or "whole" for XLA's count as well, see `step_flops`.
  """
  config = schema.check_config(config)
  # A run so long that every objective has started at its end.
  recipe = build_step_spec(config, total_steps=10**9)
  batch = {
    name: jax.ShapeDtypeStruct((batch_size, *field.shape), field.dtype)
    for name, field in batch_fields(config, recipe).items()
  }
  return step_flops(
    without_recomputation(recipe), batch, optax.adam(1e-3), compile=compile
  )


def batch_fields(
  config: schema.Config, recipe: StepSpec
) -> Mapping[str, ops.Field]:
  """Shapes and dtypes of a batch's rows; opens no data and no tokenizer."""
  # The shapes are the same with any tokenizer.
  tokenizer = tokenizers.build_tokenizer("bytes") if config.model.text else None
  return ops.build_ops(
    config.data.ops, tokenizer=tokenizer, wanted=recipe.fields()
  ).fields


def make_views(
  recipe: StepSpec,
  batch: Mapping[str, Any],
  *,
  names: Sequence[str] | None = None,
  mesh: Mesh | None = None,
) -> dict[str, Any]:
  """Views of a batch at step 0 by name, all of the recipe's or some."""
  images, sizes = batch["image"], batch["image_size"]
  step = jnp.zeros((), jnp.int32)
  keys = gradients.view_keys(recipe, step, len(images), mesh)
  return {
    name: recipe.views[name](images, sizes, keys[name], recipe.dtype)
    for name in names or keys
  }


def without_recomputation(recipe: StepSpec) -> StepSpec:
  """The same step with nothing computed twice to save memory."""
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
  """FLOPs of a step without recomputation, as MFU counts them."""
  return _count_step(without_recomputation(recipe), tx, batch)


def _count_step(recipe: StepSpec, tx: Any, batch: Mapping[str, Any]) -> float:
  update = make_update_fn(recipe, recipe, tx)
  return count(update, _abstract_state(recipe, tx), dict(batch)).flops


def groups(recipe: StepSpec) -> dict[str, tuple[str, ...]]:
  """Objectives as separate runs train them: those with a teacher are one."""
  distilled = tuple(
    n for n in recipe.objectives if recipe.only((n,)).has_teacher
  )
  single = {n: (n,) for n in recipe.objectives if n not in distilled}
  return {**single, **({"+".join(distilled): distilled} if distilled else {})}


def step_flops(
  recipe: StepSpec,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  tx: optax.GradientTransformation,
  *,
  compile: str = "no",
) -> StepFlops:
  """Counts the step of a recipe.

  Args:
    recipe: of the step.
    batch: shapes and dtypes of the batch.
    tx: the optimizer.
    compile: "no", or "whole": XLA compiles and counts the step as well, for one
      device and with unrolled layers (two minutes for a ViT-L).
  """
  check_choice("compile", compile, ("no", "whole"))
  whole = compile == "whole"
  rows = batch["image"].shape[0]
  alone = {
    name: _count_step(recipe.only(members), tx, batch) / rows
    for name, members in groups(recipe).items()
  }
  return StepFlops(
    parts={
      name: flops / rows
      for name, flops in _count_parts(recipe, batch, tx).items()
    },
    traced=_count_step(recipe, tx, batch) / rows,
    compiled=_xla_flops(recipe, batch, tx) / rows if whole else None,
    alone=alone,
    batch_size=rows,
  )


def _abstract_state(recipe: StepSpec, tx: optax.GradientTransformation) -> Any:
  return jax.eval_shape(
    functools.partial(init_state, recipe, tx),
    abstract_params(recipe),
  )


def _xla_flops(recipe: StepSpec, batch: Any, tx: Any) -> float:
  """XLA's cost analysis of the compiled step on one device."""
  unrolled = dataclasses.replace(
    recipe, runtime={**recipe.runtime, "scan": False}
  )
  mesh = make_mesh(dict(data=1), jax.devices()[:1])
  program = make_program(unrolled, tx, mesh)
  lowered = program.compiled().lower(program.abstract, batch)
  # The count is that of the HLO: machine code may be of any quality.
  cpu = jax.default_backend() == "cpu"
  options = {"xla_backend_optimization_level": 0} if cpu else {}
  return lowered.compile(options).cost_analysis()["flops"]


def _count_parts(recipe: StepSpec, batch: Any, tx: Any) -> dict[str, float]:
  """FLOPs per batch of every part of a step, each traced on its own."""
  state, parts = _abstract_state(recipe, tx), {}
  views = jax.eval_shape(functools.partial(make_views, recipe), batch)
  for name in views:
    make_view = functools.partial(make_views, recipe, names=[name])
    parts[f"view {name}"] = count(make_view, batch).flops

  def encode(plan, params, teacher, views, batch):
    params = gradients.stop_gradient_frozen(recipe, params)
    return encodings_lib.encode(
      plan, recipe.towers, params, teacher, views, batch
    )

  args = (state.params, state.teacher, views, batch)
  encoded = jax.eval_shape(functools.partial(encode, recipe.plan), *args)
  loss_inputs = functools.partial(_loss_inputs, recipe)
  heads = state.params["heads"]
  reads = count(loss_inputs, encoded, heads, state, batch, views).reads
  leaves, tree = jax.tree.flatten(encoded)
  read = jax.tree.unflatten(tree, reads[: len(leaves)])
  for encoding, taps in recipe.plan.items():
    keep = jax.tree.leaves(read[encoding])
    forward = functools.partial(encode, {encoding: taps})
    if encoding.weights == base.TEACHER:
      flops = count(forward, *args, keep=keep).flops
    else:
      flops = _count_with_gradient(forward, args, encoded[encoding], keep)
    parts[str(encoding)] = flops
  for name in recipe.objectives:
    parts |= _count_objective(
      recipe.only((name,)), state, encoded, batch, views
    )

  def finish(state, grads):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    teacher = update_teacher(recipe, state.teacher, params, state.step)
    return params, opt_state, teacher

  parts["optimizer"] = count(finish, state, state.params).flops
  return parts


def _loss_inputs(recipe, encoded, params, state, batch, views):
  heads = gradients.bind_heads(recipe, params, state)
  return {
    name: objective.loss_inputs(encoded, heads, {**batch, "views": views})
    for name, objective in recipe.objectives.items()
  }


def _count_with_gradient(
  forward: Callable[..., PyTree],
  args: tuple,
  outputs: PyTree,
  keep: Sequence[bool],
) -> float:
  """A forward pass and its VJP from the needed results to `args[0]`."""

  def select(tree):
    leaves = jax.tree.leaves(tree)
    return [x for x, k in zip(leaves, keep, strict=True) if k]

  def forward_and_pull(params, rest, cotangents):
    values, pull = jax.vjp(lambda p: select(forward(p, *rest)), params)
    return values, pull(cotangents)

  return count(forward_and_pull, args[0], args[1:], select(outputs)).flops


def _count_objective(recipe, state, encoded, batch, views) -> dict[str, float]:
  """Heads and loss of a recipe with one objective, forward and backward."""
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

  def loss_and_gradients(heads, leaves, state):
    def loss(heads, floats):
      floats = iter(floats)
      given = [
        next(floats) if r else x for x, r in zip(leaves, real, strict=True)
      ]
      whole = jax.tree.unflatten(tree, given)
      return gradients.compute_losses(recipe, heads, state, whole)[0]

    floats = [x for x, r in zip(leaves, real, strict=True) if r]
    return jax.value_and_grad(loss, argnums=(0, 1))(heads, floats)

  return {
    f"heads of {name}": _count_with_gradient(loss_inputs, args, shapes, real),
    f"loss of {name}": count(loss_and_gradients, params, leaves, state).flops,
  }
