"""Rates and decays of the recipe dinov2_l16 over a run, against DINOv2's.

`dinov2_groups.json` has the output of dinov2's
`get_params_groups_with_decay` and `CosineScheduler` (commit b8931f7) for three
configs, at batch sizes 1,024, 2,048 and 3,072: multipliers by block, schedules
at some steps. This file run as a command prints our side:

  python tests/train/optim/test_dinov2_groups.py vitl16_short
"""

import functools
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.config import recipes
from mtv_jax.config.durations import RunLength
from mtv_jax.train import run as run_lib
from mtv_jax.train import spec as spec_lib
from mtv_jax.train.config import resolve
from mtv_jax.train.optim.optimizer import make_optimizer
from mtv_jax.train.optim.param_rules import match_param_rules
from mtv_jax.utils.tree import flatten_with_names, map_with_names

GROUPS = json.loads(
  pathlib.Path(__file__).with_name("dinov2_groups.json").read_text()
)


# The arguments of our recipe.
RUNS = {
  "ssl_default_config": dict(batch=1024),
  "vitl16_short": dict(),
  "vitl14": dict(long=True),
}


@functools.cache
def build(name):
  """The optimizer, parameters of one number a layer, and their true sizes."""
  config = recipes.read_config("dinov2_l16", **RUNS[name])
  # Updates of size 1, to read rates and decays off them.
  config.optim.update(name="sgd", clip_by="global", clip_norm=0.0)
  config = resolve(config)
  length = RunLength.of_total(config.total, config.batch_size)
  spec = run_lib.build_spec(config, length.total_steps)
  shapes = spec_lib.abstract_params(spec)
  numbers = {n: x.size for n, x in flatten_with_names(shapes)}

  def shrink(name, x):
    depth = x.shape[0] if "/blocks/" in name else 1
    return jnp.ones((depth, *[1] * max(len(x.shape) - 1, 0)))

  params = map_with_names(shrink, shapes)
  optimizer = make_optimizer(
    config.parts.update_rule,
    config.optim,
    config.schedule,
    length=length,
    params=params,
    table=match_param_rules(
      params,
      config.optim.rules,
      length=length,
      start_steps=spec.start_steps,
    ),
  )
  return optimizer, params, numbers


def measure(name, steps):
  """By step, the rates and the decays of all layers by parameter."""
  optimizer, params, _ = build(name)
  zeros = jax.tree.map(jnp.zeros_like, params)
  init = optimizer.tx.init(params)

  @jax.jit
  def update(step):
    state = jax.tree.map(lambda x: jnp.full_like(x, step), init)
    rate, _ = optimizer.tx.update(params, state, zeros)
    decay, _ = optimizer.tx.update(zeros, state, params)
    return rate, decay

  for step in steps:
    yield [
      {n: -np.ravel(x) for n, x in flatten_with_names(tree)}
      for tree in jax.device_get(update(step))
    ]


# DINOv2's names and ours: regexes and their replacements.
NAMES = (
  (r"^backbone\.", "image/"),
  (r"^(dino|ibot)_head\.", r"heads/\1/"),
  (r"\.", "/"),
  (r"pos_embed", "position_embedding"),
  (r"patch_embed/proj", "patch_embed"),
  (r"attn/proj", "attention/out"),
  (r"attn/qkv", "attention/qkv"),
  (r"ls(\d)/gamma", r"scale\1"),
  (r"mlp/w12", "mlp/gate+fc1"),
  (r"mlp/w3", "mlp/fc2"),
  (r"mlp/0", "mlp/fc1"),
  (r"mlp/2", "mlp/fc2"),
  (r"mlp/4", "mlp/fc3"),
  (r"norm(\d?)/weight", r"norm\1/scale"),
  (r"last_layer/weight_g", "last_layer/scale"),
  (r"weight(_v)?$", "kernel"),
)


def our_name(name):
  for pattern, replacement in NAMES:
    name = re.sub(pattern, replacement, name)
  return name


@pytest.mark.parametrize("name", RUNS)
def test_every_parameter_has_the_rate_and_decay_of_dinov2(name):
  theirs = GROUPS[name]
  parameters = {our_name(n): p for n, p in theirs["parameters"].items()}
  _, _, numbers = build(name)
  for parameter in [n for n in parameters if "/gate+fc1/" in n]:
    row = parameters.pop(parameter)
    row = {**row, "numbers": row["numbers"] // 2}
    for half in ("gate", "fc1"):
      parameters[parameter.replace("gate+fc1", half)] = row
  assert parameters.keys() == numbers.keys()
  for parameter, row in parameters.items():
    # Theirs has a position of CLS, and patches of 14 pixels.
    if not re.search("position_embedding|patch_embed/kernel", parameter):
      assert row["numbers"] == numbers[parameter], parameter
  peak = max(theirs["rate"])
  warmup = theirs["steps"][theirs["rate"].index(peak)] + 1
  for i, (step, (rates, decays)) in enumerate(
    zip(theirs["steps"], measure(name, theirs["steps"]), strict=True)
  ):
    # Their warm-up starts at 0, ours one step later.
    late = peak / warmup if step < warmup else 0.0
    for parameter, row in parameters.items():
      key = "last_layer_rate" if row["last_layer"] else "rate"
      expected = theirs[key][i]
      if row["last_layer"] and not theirs[key][i]:
        assert not rates[parameter].any() and not decays[parameter].any()
        continue
      tolerance = dict(rtol=2e-6, atol=late + 1e-7 * peak)
      message = f"{parameter} at step {step}"
      np.testing.assert_allclose(
        rates[parameter] / row["rate"], expected, err_msg=message, **tolerance
      )
      wanted = rates[parameter] * theirs["weight_decay"][i] * row["decay"]
      np.testing.assert_allclose(
        decays[parameter], wanted, rtol=1e-5, err_msg=message
      )


@pytest.mark.parametrize(
  ("name", "total"),
  [("ssl_default_config", 36.2), ("vitl16_short", 51.2), ("vitl14", 9.88)],
)
def test_the_decay_of_a_whole_run_is_that_of_dinov2(name, total):
  optimizer, _, _ = build(name)
  steps = jnp.arange(625_000 if name == "vitl14" else 125_000)
  rates = np.float64(jax.vmap(optimizer.schedule)(steps))
  decays = np.float64(jax.vmap(optimizer.weight_decay)(steps))
  ours = (rates * decays).sum()
  assert ours == pytest.approx(total, rel=2e-3)
  theirs = GROUPS[name]["sum_of_rate_times_decay"]
  assert ours == pytest.approx(theirs, rel=1e-4)
  (start,) = {r.start for r in optimizer.table if "last_layer" in r.name}
  theirs = GROUPS[name]["sum_of_last_layer_rate_times_decay"]
  assert (rates * decays)[start:].sum() == pytest.approx(theirs, rel=1e-4)


def main(name):
  steps = GROUPS[name]["steps"]
  print("parameter, rate and decay at", *steps, sep="\t")
  found = list(measure(name, steps))
  for parameter in found[0][0]:
    for part, label in enumerate(("rate", "rate x decay")):
      rows = [step[part][parameter] for step in found]
      for layer, values in enumerate(np.stack(rows, 1)):
        row = "\t".join(f"{x:.6g}" for x in values)
        print(f"{parameter}[{layer}] {label}", row, sep="\t")


if __name__ == "__main__":
  main(sys.argv[1])
