"""MAE and depth in whole train steps: learning, and without labels."""

import functools

import jax
import numpy as np
import optax
import pytest
from xla_options import EXACT

from mtv_jax.augment import views
from mtv_jax.data.labels import label_values
from mtv_jax.data.scenes import render as scenes
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import build_objective
from mtv_jax.parallel.mesh import make_mesh, shard_batch
from mtv_jax.train import gradients
from mtv_jax.train.spec import ObjectiveWeight, StepSpec, abstract_params
from mtv_jax.train.step import make_program
from mtv_jax.utils.tree import flatten_with_names, map_with_names

SPEC = ModelSpec.from_config(
  dict(variant="mu/8", image_size=32, pool="mean", cls_token=True)
)
VIEWS = views.build_views(
  {
    "image": dict(ops="crop(32, 0.5, 1.0)|flip"),
    "mae": dict(ops="crop(32, 0.2, 1.0)|flip|keep(0.25, patch=8)"),
  }
)
ENTRIES = {
  "depth": dict(),
  "mae": dict(decoder_width=32, decoder_depth=2, decoder_heads=4),
}
# Their gradients on the encoder are then of one size.
WEIGHTS = {"depth": 0.02, "mae": 1.0}
ROWS = 16


@functools.cache
def one_device():
  return make_mesh(dict(data=1), jax.devices()[:1])


def make_spec(*names):
  return StepSpec(
    model=SPEC,
    dtype="float32",
    objectives={
      name: build_objective(name, ENTRIES[name]).resolve(SPEC, VIEWS)
      for name in names
    },
    weights={name: ObjectiveWeight(WEIGHTS[name]) for name in names},
    views=VIEWS,
    seed=0,
    total_steps=100,
  )


@functools.cache
def make_batch():
  rendered = [scenes.render(i, size=40) for i in range(ROWS)]
  outcomes = [
    label_values.make_depth(scene.inverse_depth, side=24) for scene in rendered
  ]
  labels = np.stack([outcome.label.values for outcome in outcomes])
  # Uneven over the devices; some devices lack labels.
  labels[4:8] = 0
  labels[0] = 0
  labels[9, :, :12] = 0
  return {
    "image": np.stack([scene.image for scene in rendered]),
    "image_size": np.full((ROWS, 2), 40, np.int32),
    "depth": labels,
  }


@functools.cache
def params_of(*names):
  """Drawn here: compiling the initialisers takes longer than all the rest."""
  rng = np.random.default_rng(1)

  def draw(name, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    if name.endswith("kernel"):
      shape = leaf.shape[1:] if "blocks" in name else leaf.shape
      return noise / np.sqrt(np.prod(shape[:-1]))
    return np.float32(name.endswith("scale")) + 0.02 * noise

  shapes = abstract_params(make_spec(*names))
  return map_with_names(draw, shapes)


@functools.cache
def compute_losses():
  """(batch) -> losses by objective, and the gradients of their sum."""
  spec = make_spec(*ENTRIES)
  program = make_program(spec, optax.sgd(0.1), one_device())
  state = program.init(params_of(*ENTRIES))

  def compute(state, batch):
    (_, terms), grads = gradients.compute_gradients(spec, state, batch)
    return {name: term.loss.value() for name, term in terms.items()}, grads

  jitted = jax.jit(compute, compiler_options=EXACT)

  def call(batch):
    losses, grads = jax.device_get(
      jitted(state, shard_batch(batch, one_device()))
    )
    return losses, dict(flatten_with_names(grads))

  return call


@pytest.fixture(scope="module")
def alone():
  return compute_losses()(make_batch())


@pytest.mark.slow
def test_initial_losses_have_their_expected_size(alone):
  losses, _ = alone
  # The error of a guess of zero, for targets of variance one.
  assert 0.9 < losses["mae"] < 3.0
  # A map of mean absolute deviation one, and the grads of noise: about one
  # down and one across at each of four scales, twice.
  assert 1.0 < losses["depth"] < 25.0


def test_absent_labels_leave_the_other_objectives(alone):
  blank = make_batch() | {"depth": np.zeros((ROWS, 24, 24), np.uint16)}
  losses, grads = compute_losses()(blank)
  assert losses["depth"] == 0
  assert losses["mae"] == alone[0]["mae"]
  for path, slope in grads.items():
    if path.startswith("heads/depth"):
      assert not slope.any(), path
    if path.startswith("heads/mae_decoder"):
      np.testing.assert_array_equal(slope, alone[1][path])


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_an_objective_alone_learns(name):
  built = make_spec(name)
  program = make_program(built, optax.adam(3e-3), one_device())
  state = program.init(params_of(name))
  # A view that no objective reads is not computed.
  view = built.objectives[name].view
  assert [e.view for e in built.plan] == [view]
  batch = shard_batch(make_batch(), one_device())
  history = []
  for _ in range(30):
    state, metrics = program.update(state, batch)
    history.append(jax.device_get(metrics))
  first = np.mean([m[f"{name}/loss"] for m in history[:3]])
  last = np.mean([m[f"{name}/loss"] for m in history[-3:]])
  assert last < 0.9 * first
  metrics = history[-1]
  if name == "depth":
    assert metrics["depth/labelled"] == 11 / 16
    total = metrics["depth/ssi"] + 2 * metrics["depth/gradient"]
    np.testing.assert_allclose(metrics["depth/loss"], total, rtol=1e-5)
    assert metrics["depth/error"] < history[0]["depth/error"]
  else:
    assert metrics["mae/hidden"] == 0.75
