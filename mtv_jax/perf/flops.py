"""FLOPs of a train step: analytically by part, and of the compiled step.

If the whole step costs no more than the sum of its parts, each traced once,
nothing is computed twice.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.sharding import Mesh
from jaxtyping import PyTree

from mtv_jax.config.sections import Config
from mtv_jax.models import attention
from mtv_jax.models.remat import Remat
from mtv_jax.objectives import base
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.perf import hlo
from mtv_jax.train import forward as forward_lib
from mtv_jax.train.config import RunConfig, resolve
from mtv_jax.train.run import (
  abstract_batch,
  batch_fields,
  build_spec,
)
from mtv_jax.train.spec import StepSpec, abstract_state
from mtv_jax.train.step import make_train_step, make_update_fn, update_teacher
from mtv_jax.utils.errors import check_choice


class Cost(NamedTuple):
  """Cost of a traced function."""

  flops: float  # FLOPs of matrix products and convolutions.
  reads: list[bool]  # Whether the results depend on each argument leaf.


def count(
  function: Callable[..., PyTree], *args: PyTree, keep: Sequence[bool] = ()
) -> Cost:
  """Counts FLOPs of matrix products and convolutions in a function's jaxpr.

  Dead code is free, common subexpressions count once, a loop body once per
  iteration, a conditional only its False branch, see `hlo.Module.run_counts`.
  `keep` flags the result leaves that are needed; default: all.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return _count_live(jaxpr, list(keep or [True] * len(jaxpr.outvars)))


def _count_live(jaxpr: Any, keep: list[bool]) -> Cost:
  canonical = _find_common_subexpressions(jaxpr)

  def select_variables(variables, needed):
    return {
      canonical.get(var, var)
      for var, is_needed in zip(variables, needed, strict=True)
      if is_needed and not isinstance(var, core.Literal)
    }

  live, total = select_variables(jaxpr.outvars, keep), 0.0
  for eqn in reversed(jaxpr.eqns):
    needed = [var in live for var in eqn.outvars]
    if any(needed) or eqn.effects:
      flops, reads = _count_equation(eqn, needed)
      total += flops
      live |= select_variables(eqn.invars, reads)
  return Cost(total, [var in live for var in jaxpr.invars])


def _find_common_subexpressions(jaxpr: Any) -> dict[Any, Any]:
  """Maps the outputs of repeated operations to the first equal variable."""
  equations: dict[Any, Any] = {}
  canonical: dict[Any, Any] = {}
  for eqn in jaxpr.eqns:
    inputs = tuple(
      ("literal", str(var), str(var.aval))
      if isinstance(var, core.Literal)
      else canonical.get(var, var)
      for var in eqn.invars
    )
    # Ignores callables: those for custom derivatives differ at every call and
    # have no effect after differentiation. Jaxprs with equal text differ only
    # in constants.
    params = tuple(
      (key, id(value) if getattr(value, "consts", None) else str(value))
      for key, value in sorted(eqn.params.items())
      if not callable(value)
    )
    first_equation = equations.setdefault((eqn.primitive, inputs, params), eqn)
    if first_equation is not eqn and not eqn.effects:
      canonical.update(zip(eqn.outvars, first_equation.outvars, strict=True))
  return canonical


def _count_equation(eqn: Any, needed: list[bool]) -> Cost:
  """Counts the FLOPs of one operation, and finds which inputs it reads."""
  all_read, name = [True] * len(eqn.invars), eqn.primitive.name
  shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
  if name == "dot_general":
    (contract, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(shapes[0][i] for i in contract)
    return Cost(2.0 * math.prod(shapes[-1]) * inner, all_read)
  if name == "conv_general_dilated":
    specs = eqn.params["dimension_numbers"]
    return Cost(hlo.count_conv_flops(shapes, specs, eqn.params), all_read)
  leaves = jax.tree.leaves(eqn.params)
  bodies = [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in leaves]
  bodies = [x for x in bodies if isinstance(x, core.Jaxpr)]
  if len(bodies) == 1 and name not in ("scan", "while", "cond"):
    (body,) = bodies
    if len(body.invars) == len(all_read) and len(body.outvars) == len(needed):
      return _count_live(body, needed)
  if bodies and name == "cond":
    costs, reads = zip(*(_count_live(b, needed) for b in bodies), strict=True)
    return Cost(costs[0], [True, *map(any, zip(*reads, strict=True))])
  # A loop needs all its results: the next iteration reads them.
  costs = [_count_live(b, [True] * len(b.outvars)).flops for b in bodies]
  return Cost(sum(costs, 0.0) * eqn.params.get("length", 1), all_read)


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """FLOPs of a train step per image."""

  parts: dict[str, float]  # Forward and backward.
  traced: float  # Whole step, counted like the parts.
  compiled: float | None  # XLA's count, with elementwise operations.
  alone: dict[str, float]  # Steps with one group of objectives each.
  batch_size: int

  @property
  def total(self) -> float:
    """The sum of the parts."""
    return sum(self.parts.values())

  @property
  def share(self) -> float:
    """FLOPs of the joint step over the sum of the groups' separate steps."""
    return self.traced / sum(self.alone.values())

  def to_json(self) -> str:
    """The values as one line of JSON."""
    parts = [dict(name=name, flops=flops) for name, flops in self.parts.items()]
    extra = dict(parts=parts, total=self.total, share=self.share)
    return json.dumps({**dataclasses.asdict(self), **extra})

  def __str__(self) -> str:
    rows = dict(self.parts)
    rows |= {"sum of the parts": self.total, "whole step": self.traced}
    footer = [f"one step / runs alone: {100 * self.share:.1f} %"]
    if self.compiled is not None:
      rows["whole step, compiled (XLA)"] = self.compiled
      excess = 100 * (self.compiled / self.total - 1)
      footer.append(f"compiled / sum of the parts: {excess:+.2f} %")
    rows |= {f"alone: {k}": v for k, v in self.alone.items()}
    width = max(map(len, rows))
    lines = [f"GFLOP per image, batch {self.batch_size}"]
    for name, flops in rows.items():
      share = 100 * flops / self.total
      lines.append(f"{name:{width}}  {flops / 1e9:10.3f}  {share:6.1f} %")
    return "\n".join(lines + footer)


def run(
  config: Config | RunConfig, *, batch_size: int = 64, compile: str = "no"
) -> StepFlops:
  """Counts the FLOPs of a config's train step, without rematerialisation.

  Opens no data and needs no accelerator.

  Args:
    config: a config as `train` takes it.
    batch_size: batch size; the cost per image hardly depends on it.
    compile: "no", or "whole" to add XLA's count of the whole step, see
      `step_flops`.
  """
  check_choice("compile", compile, ("no", "whole"))
  config = resolve(config)
  spec = build_all_objectives_spec(config)
  batch = abstract_batch(batch_size, batch_fields(config, spec))
  return step_flops(
    without_recomputation(spec),
    batch,
    optax.adam(1e-3),
    with_xla_count=compile == "whole",
  )


def build_all_objectives_spec(config: RunConfig) -> StepSpec:
  """Builds the step of a run long enough for all objectives; opens no data."""
  return build_spec(
    config, total_steps=10**9, examples_per_epoch=config.batch_size
  )


def make_views(
  spec: StepSpec,
  batch: Mapping[str, Any],
  *,
  names: Sequence[str] | None = None,
  mesh: Mesh | None = None,
) -> dict[str, Any]:
  """Computes views of a batch at step 0, `{name: view}`; default: all views."""
  images, sizes = batch["image"], batch["image_size"]
  step = jnp.zeros((), jnp.int32)
  keys = forward_lib.view_keys(spec, step, len(images), mesh)
  return {
    name: spec.views[name](images, sizes, keys[name], spec.dtype)
    for name in names or keys
  }


def without_recomputation(spec: StepSpec) -> StepSpec:
  """Removes rematerialisation, chunking and accumulation from a step."""
  disabled = dict(chunk=None, remat="none")
  objectives = {
    name: dataclasses.replace(
      objective, **{k: v for k, v in disabled.items() if hasattr(objective, k)}
    )
    for name, objective in spec.objectives.items()
  }
  return dataclasses.replace(
    spec,
    objectives=objectives,
    remat=Remat("none"),
    accumulate=1,
    # Kernels hide their matrix products, and recompute blocks of queries.
    runtime={**spec.runtime, "attention": attention.PLAIN},
  )


def count_flops_per_image(settings: Mapping[str, Any]) -> float:
  """Model FLOPs per image of a resolved config's step with all objectives."""
  config = resolve(settings)
  spec = build_all_objectives_spec(config)
  rows = min(config.batch_size, 64)  # The cost per image hardly depends on it.
  batch = abstract_batch(rows, batch_fields(config, spec))
  return model_flops(spec, optax.adam(1e-3), batch) / rows


def model_flops(
  spec: StepSpec,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct | jax.Array],
) -> float:
  """Model FLOPs of a step, without recomputation, as in MFU."""
  return _count_step(without_recomputation(spec), tx, batch)


def _count_step(spec: StepSpec, tx: Any, batch: Mapping[str, Any]) -> float:
  update = make_update_fn(spec, spec, tx)
  return count(update, abstract_state(spec, tx), dict(batch)).flops


def step_flops(
  spec: StepSpec,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  tx: optax.GradientTransformation,
  *,
  with_xla_count: bool = False,
) -> StepFlops:
  """Counts the FLOPs of each part of a step, and of the whole step.

  `with_xla_count` adds XLA's count for one device with unrolled layers.
  """
  images, xla_flops = batch["image"].shape[0], None
  if with_xla_count:
    runtime = {**spec.runtime, "scan": False}
    mesh = make_mesh(dict(data=1), jax.devices()[:1])
    train_step = make_train_step(
      dataclasses.replace(spec, runtime=runtime), tx, mesh
    )
    lowered = train_step.update.lower(train_step.abstract, batch)
    # XLA counts the HLO, so skip optimizing machine code.
    is_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_cpu else {}
    xla_flops = lowered.compile(options).cost_analysis()["flops"] / images
  # One group per separate run; all objectives with a teacher form one group.
  teacher_names = tuple(
    n for n in spec.objectives if spec.select_objectives((n,)).has_teacher
  )
  groups = [(n,) for n in spec.objectives if n not in teacher_names]
  groups += [teacher_names] if teacher_names else []
  costs = [_count_step(spec.select_objectives(g), tx, batch) for g in groups]
  return StepFlops(
    parts={k: v / images for k, v in _count_parts(spec, batch, tx).items()},
    traced=_count_step(spec, tx, batch) / images,
    compiled=xla_flops,
    alone={"+".join(g): c / images for g, c in zip(groups, costs, strict=True)},
    batch_size=images,
  )


def _count_parts(spec: StepSpec, batch: Any, tx: Any) -> dict[str, float]:
  """Counts FLOPs per batch of each part of a step, traced separately."""
  state, parts = abstract_state(spec, tx), {}
  views = jax.eval_shape(functools.partial(make_views, spec), batch)
  for name in views:
    make_view = functools.partial(make_views, spec, names=[name])
    parts[f"view {name}"] = count(make_view, batch).flops

  def encode(plan, params, fixed_params, views, batch):
    params = forward_lib.stop_gradient_frozen(spec, params)
    params = spec.merge_adapters(params)
    fixed_params = spec.merge_adapters(fixed_params)
    batch = {**batch, "views": views}
    return forward_lib.encode(spec, params, fixed_params, batch, plan=plan)

  args = (state.params, state.fixed_params, views, batch)
  encoded = jax.eval_shape(functools.partial(encode, spec.plan), *args)
  loss_inputs = functools.partial(_compute_loss_inputs, spec)
  heads = state.params["heads"]
  reads = count(loss_inputs, encoded, heads, state, batch, views).reads
  leaves, tree = jax.tree.flatten(encoded)
  reads_tree = jax.tree.unflatten(tree, reads[: len(leaves)])
  for encoding, layers in spec.plan.items():
    keep = jax.tree.leaves(reads_tree[encoding])
    forward = functools.partial(encode, {encoding: layers})
    if encoding.weights != base.STUDENT:
      flops = count(forward, *args, keep=keep).flops
    else:
      flops = _count_with_gradient(forward, args, encoded[encoding], keep)
    parts[str(encoding)] = flops
  for name in spec.objectives:
    parts |= _count_objective(
      spec.select_objectives((name,)), state, encoded, batch, views
    )

  def update(state, grads):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(params=params, opt_state=opt_state)
    return update_teacher(spec, new, state, {}) if spec.has_teacher else new

  parts["optimizer"] = count(update, state, state.params).flops
  return parts


def _compute_loss_inputs(spec, encoded, params, state, batch, views):
  heads = forward_lib.bind_heads(spec, params, state, None)
  keys = forward_lib.view_keys(spec, state.step, len(batch["image"]), None)
  args = encoded, heads, state, {**batch, "views": views, "keys": keys}, None
  return {
    n: forward_lib.objective_inputs(spec, n, *args) for n in spec.objectives
  }


def _count_with_gradient(
  forward: Callable[..., PyTree],
  args: tuple,
  outputs: PyTree,
  keep: Sequence[bool],
) -> float:
  """Counts a forward pass and the VJP of kept results w.r.t. `args[0]`."""

  def select(tree):
    return list(itertools.compress(jax.tree.leaves(tree), keep))

  def forward_and_vjp(params, rest, cotangents):
    values, vjp_fn = jax.vjp(lambda p: select(forward(p, *rest)), params)
    return values, vjp_fn(cotangents)

  return count(forward_and_vjp, args[0], args[1:], select(outputs)).flops


def _count_objective(spec, state, encoded, batch, views) -> dict[str, float]:
  """Counts FLOPs of one objective's heads and loss, forward and backward."""
  (name,) = spec.objectives
  students, teachers = (
    {e: encoded[e] for e in spec.plan if (e.weights != base.STUDENT) == teacher}
    for teacher in (False, True)
  )
  params = {key: state.params["heads"][key] for key in spec.heads}

  def loss_inputs(differentiated, teachers, *rest):
    students, heads = differentiated
    return _compute_loss_inputs(spec, {**students, **teachers}, heads, *rest)

  args = ((students, params), teachers, state, batch, views)
  shapes = jax.eval_shape(loss_inputs, *args)
  keep = [jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(shapes)]

  def loss(heads, loss_inputs, state):
    return forward_lib.compute_losses(spec, heads, state, loss_inputs)[0]

  grad = jax.value_and_grad(loss, argnums=(0, 1), allow_int=True)
  return {
    f"heads of {name}": _count_with_gradient(loss_inputs, args, shapes, keep),
    f"loss of {name}": count(grad, params, shapes, state).flops,
  }
