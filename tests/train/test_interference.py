"""The interference meter against each objective's gradient by itself."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import step_samples
import trainings

from mtv_jax.cli.train import train
from mtv_jax.objectives import base, build_objective
from mtv_jax.objectives.contrastive import Contrastive
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.train import measurements
from mtv_jax.train.forward import total_loss
from mtv_jax.train.measurements import GradientMeasurements
from mtv_jax.train.spec import ObjectiveWeight
from mtv_jax.train.step import make_train_step
from mtv_jax.utils.tree import flatten_with_names

LR = 1e-3
COUNTED = ("contrastive", "copy", "negative", "dino")
NAMES = (*COUNTED, "unlabelled")


class Negative(Contrastive):
  """The negated contrastive loss."""

  def loss(self, loss_inputs, heads, context):
    terms = super().loss(loss_inputs, heads, context)
    loss = base.WeightedMean(-terms.loss.sum, terms.loss.count)
    return dataclasses.replace(terms, loss=loss)


class Unlabelled(Contrastive):
  """Contrast in a batch without captions."""

  def loss_inputs(self, encodings, heads, batch):
    batch = {**batch, "caption_valid": jnp.zeros_like(batch["caption_valid"])}
    return super().loss_inputs(encodings, heads, batch)


def make_spec(**changes):
  options = dict(init_bias=-2.0)
  weights = (1.0, 3.0, 1.0, 0.5, 1.0)
  return step_samples.make_spec(
    objectives={
      "contrastive": build_objective("contrastive", options),
      "copy": build_objective("contrastive", options),
      "negative": Negative(**options),
      "dino": step_samples.dino(),
      "unlabelled": Unlabelled(**options),
    },
    weights={
      n: ObjectiveWeight(w) for n, w in zip(NAMES, weights, strict=True)
    },
    **changes,
  )


@pytest.fixture(scope="module")
def params():
  return step_samples.params_of(make_spec())


def measure(params, shape=(1, 1, 1), **changes):
  """The compiled measurement of all objectives on a mesh."""
  mesh = step_samples.mesh_of(shape)
  train_step = make_train_step(make_spec(**changes), optax.sgd(0.1), mesh)
  state = train_step.init(params)
  batch = shard_batch(step_samples.make_batch(), mesh)
  interference = GradientMeasurements(train_step).interference
  return jax.device_get(interference(state, batch, NAMES, np.float32(LR)))


@pytest.fixture(scope="module")
def one_device(params):
  return measure(params)


@pytest.fixture(scope="module")
def brute_force(params):
  """Losses as a function of parameters, and each one's gradient."""
  spec, batch = make_spec(), step_samples.make_batch()
  tx, mesh = optax.sgd(0.1), step_samples.mesh_of((1, 1, 1))
  state = make_train_step(spec, tx, mesh).init(params)

  def loss(image, batch, name):
    own = {**params, "image": image}
    alone = dataclasses.replace(
      spec.select_objectives((name,)), weights={name: ObjectiveWeight(1.0)}
    )
    return total_loss(alone, own, state, batch)[0]

  @jax.jit
  def losses(image, batch):
    return {name: loss(image, batch, name) for name in NAMES}

  @jax.jit
  def all_grads(image, batch):
    return {name: jax.grad(loss)(image, batch, name) for name in NAMES}

  grads = jax.device_get(all_grads(params["image"], batch))
  grads = {n: dict(flatten_with_names(tree)) for n, tree in grads.items()}
  return functools.partial(losses, batch=batch), grads


def blocks_of(grad):
  """The gradient of each block as one vector, float64."""
  depth = len(grad["blocks/norm1/scale"])
  blocks = {name: [] for name in measurements.block_names(depth)}
  for name, leaf in grad.items():
    if name.startswith("blocks/"):
      for layer in range(depth):
        blocks[str(layer)].append(leaf[layer])
    else:
      first = name.split("/")[0]
      blocks["pool" if first in ("norm", "pool") else "embedding"].append(leaf)
  return [
    np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)
    for leaves in blocks.values()
  ]


def check_against(actual, brute_force):
  """Norms and cosines of a measurement against separate gradients."""
  losses, grads = brute_force
  blocks = {name: blocks_of(grads[name]) for name in NAMES}
  for i, a in enumerate(NAMES):
    weight = make_spec().weights[a].value
    norms = weight * np.array([np.linalg.norm(g) for g in blocks[a]])
    np.testing.assert_allclose(actual["norms"][i], norms, rtol=1e-5)
    for j, b in enumerate(NAMES):
      expected = [
        g @ h / (np.linalg.norm(g) * np.linalg.norm(h) or 1.0)
        for g, h in zip(blocks[a], blocks[b], strict=True)
      ]
      np.testing.assert_allclose(
        actual["cosines"][i, j], expected, rtol=0, atol=1e-5, err_msg=f"{a} {b}"
      )


@pytest.mark.slow
def test_norms_and_cosines_equal_those_of_single_gradients(
  one_device, brute_force
):
  check_against(one_device, brute_force)
  cosines, norms = one_device["cosines"], one_device["norms"]
  assert norms[:4].min() > 0
  np.testing.assert_array_equal(norms[4], 0)
  np.testing.assert_array_equal(cosines[4], 0)
  # Neither equal nor orthogonal.
  assert 0.01 < np.abs(cosines[0, 3]).max() < 0.99

  # Copies and the negative.
  np.testing.assert_allclose(cosines[0, 1], 1, rtol=0, atol=1e-5)
  np.testing.assert_allclose(cosines[:2, 2], -1, rtol=0, atol=1e-5)
  np.testing.assert_allclose(norms[1], 3 * norms[0], rtol=1e-5)


@pytest.mark.slow
def test_transfer_equals_differences_of_losses(params, one_device, brute_force):
  losses, grads = brute_force
  image = jax.device_get(params["image"])
  flat = dict(flatten_with_names(image))

  def norm(tree):
    return np.sqrt(sum(np.square(np.float64(x)).sum() for x in tree.values()))

  before = losses(image)
  for i, name in enumerate(COUNTED):
    scale = LR * norm(flat) / norm(grads[name])
    stepped = {n: np.float32(flat[n] - scale * grads[name][n]) for n in flat}
    treedef = jax.tree.structure(image)
    after = losses(jax.tree.unflatten(treedef, list(stepped.values())))
    for j, other in enumerate(COUNTED):
      expected = 1 - float(after[other]) / float(before[other])
      np.testing.assert_allclose(
        one_device["transfer"][i, j], expected, rtol=1e-3, atol=2e-6
      )
    assert (
      np.sign(one_device["losses"][i]) * one_device["transfer"][i, i] > 1e-4
    )
  np.testing.assert_allclose(
    one_device["losses"], [before[n] for n in NAMES], rtol=1e-5
  )
  # A loss before and after a step along zero, each rounded.
  for transfer in (one_device["transfer"][4], one_device["transfer"][:, 4]):
    np.testing.assert_allclose(transfer, 0, atol=np.finfo(np.float32).eps)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("shape", "accumulate"),
  [
    ((2, 2, 2), 2),
    pytest.param((1, 8, 1), 1, marks=pytest.mark.long),
  ],
)
def test_meshes_and_parts(params, one_device, brute_force, shape, accumulate):
  actual = measure(params, shape=shape, accumulate=accumulate)
  check_against(actual, brute_force)
  np.testing.assert_allclose(
    actual["transfer"], one_device["transfer"], rtol=1e-3, atol=2e-6
  )


def test_conflicts_of_a_case_by_hand():
  # Three objectives on two blocks; the third's gradient on the second is 0.
  cosines = np.zeros((3, 3, 2))
  cosines[0, 1] = cosines[1, 0] = -0.5, 0.2
  cosines[0, 2] = cosines[2, 0] = -0.1, 0.0
  cosines[1, 2] = cosines[2, 1] = 0.3, 0.0
  norms = np.array([[1.0, 2.0], [3.0, 1.0], [2.0, 0.0]])
  assert measurements.conflict_share(cosines, norms) == 2 / 4
  assert measurements.conflict_share(cosines, 0 * norms) == 0
  scalars = measurements.interference_scalars(
    dict(cosines=cosines, norms=norms, transfer=np.eye(3) + 0.5)
  )
  whole = [
    (-0.5 * 3 + 0.2 * 2) / np.sqrt(5 * 10),
    -0.1 * 2 / np.sqrt(5 * 4),
    0.3 * 6 / np.sqrt(10 * 4),
  ]
  assert scalars == {
    "interference/conflicts": 0.5,
    "interference/cosine_mean": pytest.approx(np.mean(whole)),
    "interference/cosine_min": pytest.approx(min(whole)),
    "interference/transfer_mean": 0.5,
  }


@pytest.mark.slow
def test_a_resumed_run_has_one_line_for_each_measurement(tmp_path):
  """The second objective starts after three updates."""
  config = trainings.smallest(
    total_steps=6,
    evals={},
    interference=dict(every_steps=2),
    checkpoint=dict(every_steps=4, keep=5),
    log=dict(every_steps=4),
  )
  weight = dict(value=0.5, start_steps=3)
  config.objectives.dino = dict(weight=weight, **trainings.DINO)
  train(config, tmp_path)
  path = tmp_path / "interference.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [row["step"] for row in rows] == [2, 4, 6]
  both = ["contrastive", "dino"]
  assert [row["objectives"] for row in rows] == [both[:1], both, both]
  assert rows[0]["blocks"] == ["embedding", "0", "pool"]
  assert np.shape(rows[0]["cosines"]) == (1, 1, 3)
  assert np.shape(rows[1]["cosines"]) == (2, 2, 3)
  assert np.shape(rows[1]["transfer"]) == (2, 2)
  metrics = {r["step"]: r for r in trainings.rows(tmp_path) if "loss" in r}
  conflicts = metrics[4]["interference/conflicts"]
  assert conflicts == pytest.approx(rows[1]["conflicts"])
  for row in rows:
    norms, values = np.linalg.norm(row["norms"], axis=1), metrics[row["step"]]
    logged = [values[f"{n}/encoder_grad_norm"] for n in row["objectives"]]
    np.testing.assert_allclose(norms, logged, rtol=1e-5)
  # It measured step 6 and was killed before its next checkpoint.
  shutil.rmtree(tmp_path / "checkpoints" / "6")
  train(config, tmp_path)
  again = [json.loads(line) for line in path.read_text().splitlines()]
  assert again == rows
  # Step 5, the first one after the resume, is in no file.
  steps = [row["step"] for row in trainings.rows(tmp_path) if "loss" in row]
  assert steps == list(metrics) == [1, 2, 4, 6]
