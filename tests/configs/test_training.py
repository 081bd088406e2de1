"""Every recipe, shrunk, trains to a falling loss, or its update lowers."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from mtv_jax.config import recipes
from mtv_jax.parallel.mesh import make_mesh, shard_batch
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight.compile import make_plan
from mtv_jax.train.config import resolve
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.run import make_loader, open_run
from mtv_jax.train.step import make_train_step

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
# Shrunk, these are another recipe of the list.
SAME = {
  "mtv_b16_512": "mtv_b16_224",
  "mtv_g14_224": "mtv_b16_224",
  "mtv_l16_256": "mtv_b16_224",
  "siglip_l16_256": "siglip_b16_224",
  "tips_b16_224": "tips_b14",
}
# Shrunk, these have the objectives of another recipe of the list.
COVERED = {
  "coco_photos": "siglip_b16_224",
  "continue_from": "siglip_b16_224",
  "dino_b16_224": "dinov2_l16",
  "mtv_photos": "study",
  "mtv_tiny": "study",
  "study_photos": "study",
}
ARGUMENTS = {"dinov3_l16": ",gram"}
RUNS = [
  f"{name}:tiny{ARGUMENTS.get(name, '')}"
  for name in NAMES
  if name not in {*SAME, *COVERED}
]
# Recipes that cover all objectives; `make test-long` trains the rest.
TRAINED = ("study:tiny", "dinov3_l16:tiny,gram", "siglip2_b16_256:tiny")
TRAINED += ("distill:tiny",)
# Limits for the larger recipes, such as study.
MOST_STEPS, MOST_ROWS = 20, 32


def train(recipe, workdir):
  """The losses of each update on one device, by name."""
  config = recipes.read_config(recipe)
  config.evals, config.init = {}, None
  config.batch_size = min(config.batch_size, MOST_ROWS)
  run = open_run(config, workdir)
  spec, tx = run.spec, run.optimizer.tx
  mesh = make_mesh(dict(data=1), jax.devices()[:1])
  train_step = make_train_step(spec, tx, mesh)
  run = dataclasses.replace(run, train_step=train_step)
  state, losses = initialize_state(run), []
  with make_loader(run, 0) as loader:
    steps = min(run.total_steps, MOST_STEPS)
    for step, batch in zip(range(steps), loader, strict=False):
      state = train_step.copy_teachers(state, step)
      batch = shard_batch(dict(batch), mesh)
      state, metrics = train_step.update(
        state, batch, spec.active_objectives(step)
      )
      metrics = jax.device_get(metrics)
      losses.append({k: v for k, v in metrics.items() if k.endswith("loss")})
  return losses


@pytest.mark.parametrize(("name", "other"), (SAME | COVERED).items())
def test_a_recipe_that_is_not_trained_is_covered(name, other):
  one, two = (recipes.read_config(f"{n}:tiny") for n in (name, other))
  if name in SAME:
    assert resolve(one) == resolve(two)
  else:
    assert f"{other}:tiny" in RUNS
    assert {*one.objectives} <= {*two.objectives}


def test_every_objective_is_trained():
  def types(run):
    objectives = recipes.read_config(run).objectives
    return {entry.get("type", name) for name, entry in objectives.items()}

  trained = set().union(*map(types, TRAINED))
  # tests/train/test_llava.py trains the last one.
  assert set().union(*map(types, RUNS)) == trained | {"next_token"}


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in RUNS if run not in TRAINED])
def test_the_update_lowers(run):
  plan = make_plan(recipes.read_config(run), topologies.parse("cpu:1"))
  state, metrics = plan.lower().out_info

  def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

  assert shapes(state) == shapes(plan.train_step.abstract)
  for name in plan.spec.objectives:
    assert metrics[f"{name}/loss"].shape == metrics["loss"].shape == ()


def mark(run):
  marker = pytest.mark.slow if run in TRAINED else pytest.mark.long
  return pytest.param(run, marks=marker)


@pytest.mark.parametrize("run", [*map(mark, RUNS)])
def test_the_loss_falls(run, tmp_path):
  losses = train(run, tmp_path)
  assert len(losses) >= 20
  assert all(np.isfinite(list(row.values())).all() for row in losses)
  # The weighted sum, while the objectives of the first update are computed.
  sums = [row["loss"] for row in losses if row.keys() == losses[0].keys()]
  fifth = len(sums) // 5
  assert np.mean(sums[-fifth:]) < np.mean(sums[:fifth]), sums
