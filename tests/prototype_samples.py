"""References in float64 and samples for the tests of prototype objectives."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from grounding_samples import gradients_of
from grounding_samples import unit as unit
from jax.sharding import NamedSharding, PartitionSpec

from mtv_jax.objectives import base
from mtv_jax.parallel.mesh import BATCH_SPEC


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def sinkhorn(logits, iterations=3):
  """SwAV's Algorithm 1, line by line: [n, k] logits over temperature."""
  q = np.exp(np.float64(logits)).T
  k, n = q.shape
  q /= q.sum()
  for _ in range(iterations):
    q /= q.sum(1, keepdims=True)
    q /= k
    q /= q.sum(0, keepdims=True)
    q /= n
  return (q * n).T


def koleo(x):
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  total = 0.0
  for i in range(len(x)):
    gaps = [np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i]
    total -= np.log(min(gaps) + 1e-8)
  return total / len(x)


def numeric_gradient(function, x, *, step=1e-5):
  return gradients_of(function, x, step=step)[0]


def params_of(objective, channels=5, seed=0):
  """Random parameters of its head: {'student': ..., 'teacher': ...}."""
  spec = types.SimpleNamespace(
    image=types.SimpleNamespace(embed_dim=channels, width=channels)
  )
  ((name, head),) = objective.heads().items()
  shapes = jax.eval_shape(lambda key: head.init(key, spec), jax.random.key(0))
  rng = np.random.default_rng(seed)
  draw = functools.partial(
    jax.tree.map,
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
  )
  return {side: {name: draw(shapes)} for side in ("student", "teacher")}


def bound(objective, params):
  return base.BoundHeads(
    objective.heads(), params["student"], params["teacher"]
  )


def prototypes_of(objective, params, side):
  """The last layer in float64, computed from the parameters."""
  layer = params[side][objective.head]["last_layer"]
  kernel = np.float64(layer["kernel"])
  return kernel / np.linalg.norm(kernel, axis=0) * np.float64(layer["scale"])


def context_of(objective, step=500, total_steps=1000):
  return base.Context(step, total_steps, objective.initial_statistics())


def loss_and_gradients(objective, params, loss_inputs, context, mesh=None):
  """Value, report and gradients to the loss inputs and the student's head."""

  def loss(loss_inputs, student):
    heads = bound(objective, {**params, "student": student})
    terms = objective.loss(loss_inputs, heads, context)
    report = {name: mean.value() for name, mean in terms.report.items()}
    return terms.loss.value(), (report, terms.statistics)

  student = params["student"]
  if mesh is not None:
    loss_inputs = jax.device_put(loss_inputs, NamedSharding(mesh, BATCH_SPEC))
    student = jax.device_put(student, NamedSharding(mesh, PartitionSpec()))
    # As tensor parallelism would have it: each device some prototypes.
    last = student[objective.head]["last_layer"]
    last["kernel"] = jax.device_put(
      last["kernel"], NamedSharding(mesh, PartitionSpec(None, "tensor"))
    )
  compute = jax.value_and_grad(
    loss, argnums=(0, 1), has_aux=True, allow_int=True
  )
  (value, aux), gradients = jax.jit(compute)(loss_inputs, student)
  floats = [
    x for x in jax.tree.leaves(gradients) if x.dtype != jax.dtypes.float0
  ]
  return jax.device_get((value, aux, floats))
