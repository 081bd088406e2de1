"""Parameters, gradients and a NumPy AdamW for the tests of the optimizer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtv_jax.config import sections
from mtv_jax.config.durations import RunLength
from mtv_jax.train.optim.optimizer import (
  OptimConfig,
  build_optimizer,
  make_optimizer,
)
from mtv_jax.train.optim.param_rules import match_param_rules
from mtv_jax.train.optim.schedules import ScheduleConfig
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

RNG = np.random.default_rng(0)
SHAPES = {
  "image/blocks/mlp/fc1/kernel": (2, 4, 6),
  "image/blocks/mlp/fc1/bias": (2, 6),
  "image/position_embedding": (5, 4),
  "text/token_embedding": (7, 4),
  "heads/contrastive/logit_scale": (),
}
BIAS = "image/blocks/mlp/fc1/bias"
STEPS = 6


def random_tree():
  return unflatten_names(
    {n: RNG.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
  )


PARAMS = random_tree()
GRADS = [random_tree() for _ in range(STEPS)]


def build(
  optim_config,
  schedule_config=None,
  params=PARAMS,
  total_steps=STEPS,
  batch_size=8,
  start_steps=None,
  **options,
):
  config = {"lr": 1e-2, "clip_norm": 0.0, **optim_config}
  config = sections.read(OptimConfig, config, "config.optim")
  schedule = schedule_config or {"name": "constant"}
  schedule = sections.read(ScheduleConfig, schedule, "config.schedule")
  length = RunLength(batch_size, None, total_steps)
  table = match_param_rules(
    params, config.rules, length=length, start_steps=start_steps or {}
  )
  return make_optimizer(
    build_optimizer(config),
    config,
    schedule,
    length=length,
    params=params,
    table=table,
    **options,
  )


def run(tx, params=PARAMS, grads=GRADS):
  """The parameters after each step, as flat numpy trees, and the last state."""
  params = jax.tree.map(jnp.asarray, params)
  state = tx.init(params)

  @jax.jit
  def update(params, state, grad):
    updates, state = tx.update(grad, state, params)
    return optax.apply_updates(params, updates), state

  history = []
  for grad in grads:
    params, state = update(params, state, grad)
    history.append({n: np.array(x) for n, x in flatten_with_names(params)})
  return history, state


def numpy_adamw(lr, multipliers, *, decay, clip, b1=0.9, b2=0.95, eps=1e-8):
  """AdamW as its paper writes it, in float64; lr is a function of the step."""
  p = {n: x.astype(np.float64) for n, x in flatten_with_names(PARAMS)}
  m = {n: np.zeros_like(x) for n, x in p.items()}
  v = {n: np.zeros_like(x) for n, x in p.items()}
  history = []
  for t, tree in enumerate(GRADS):
    g = dict(flatten_with_names(tree))
    norm = math.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in g.values()))
    for n in p:
      x = g[n].astype(np.float64) * min(1.0, clip / norm)
      m[n] = b1 * m[n] + (1 - b1) * x
      v[n] = b2 * v[n] + (1 - b2) * x * x
      mhat, vhat = m[n] / (1 - b1 ** (t + 1)), v[n] / (1 - b2 ** (t + 1))
      u = mhat / (np.sqrt(vhat) + eps)
      lr_mult, decay_mult = multipliers[n]
      lr_mult = lr_mult(t) if callable(lr_mult) else lr_mult
      p[n] = p[n] - lr(t) * lr_mult * (u + decay * decay_mult * p[n])
    history.append(dict(p))
  return history


def norm(tree):
  squares = [np.square(x, dtype=float).sum() for x in jax.tree.leaves(tree)]
  return math.sqrt(sum(squares))
