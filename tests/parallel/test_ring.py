"""Ring losses against all logits on one device, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from step_samples import mesh_of

from mtv_jax.models.heads.projection import unit
from mtv_jax.objectives import (
  base,
  build_objective,
  contrastive,
  grounding,
)
from mtv_jax.parallel import ring
from mtv_jax.parallel.mesh import BATCH_SPEC

SCALARS = {"logit_scale": np.float32(1.5), "logit_bias": np.float32(-2.0)}


def random_loss_inputs(name, rows=16, width=8):
  """Unit vectors, some without a partner; the second device has none."""
  rng = np.random.default_rng(0)
  if name == "contrastive":
    image, text = jnp.asarray(rng.normal(size=(2, rows, width)))
    valid = rng.random(rows) < 0.7
    valid[2:4] = False
    return contrastive.LossInputs(
      unit(image)[:, None], unit(text), jnp.asarray(valid)
    )
  region, text = jnp.asarray(rng.normal(size=(2, rows, 2, width)))
  valid = rng.random((rows, 2)) < 0.7
  valid[2:4] = False
  return grounding.LossInputs(
    region=unit(region),
    text=unit(text),
    # Five phrases, so that most repeat across devices.
    phrase_id=jnp.asarray(rng.integers(0, 5, (rows, 2)), jnp.uint32),
    valid=jnp.asarray(valid),
    boxes=jnp.zeros((rows, 2, 4)),
  )


def program(name, method, mesh):
  """Jitted `(loss_inputs, scalars) -> ((loss, report), gradients)`."""
  objective = build_objective(name, dict(method=method))
  # Other heads belong to the loss inputs.
  only = {name: objective.heads()[name]}

  def loss(loss_inputs, scalars):
    terms = objective.loss(
      loss_inputs,
      base.BoundHeads(only, {name: scalars}),
      base.Context(0, 1, {}, mesh),
    )
    report = {key: mean.value() for key, mean in terms.report.items()}
    # A cotangent other than 1, as an objective's weight makes it.
    return 0.5 * terms.loss.value(), report

  return jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
  )


@functools.cache
def result(name, method, shape):
  mesh = mesh_of(shape)
  sharded = jax.device_put(
    random_loss_inputs(name), NamedSharding(mesh, BATCH_SPEC)
  )
  scalars = jax.device_put(SCALARS, NamedSharding(mesh, PartitionSpec()))
  return jax.device_get(program(name, method, mesh)(sharded, scalars))


@pytest.mark.parametrize("shape", [(2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["contrastive", "grounding"])
def test_ring_loss_equals_the_gathered_loss(name, shape):
  value, grads = result(name, "auto", shape)
  expected, expected_grads = result(name, "gathered", (1, 1, 1))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    value,
    expected,
  )
  assert value[1]["accuracy"] > 0
  floats = 0
  for a, b in zip(
    jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
  ):
    if a.dtype == np.float32 and np.any(b):
      assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)
      floats += 1
  assert floats == 4  # Both sides, scale and bias.


def test_the_ring_needs_a_split_batch():
  assert not ring.should_use_ring("ring", None)
  assert not ring.should_use_ring("auto", mesh_of((1, 1, 2)))
  assert ring.should_use_ring("auto", mesh_of((1, 2, 1)))
  assert not ring.should_use_ring("gathered", mesh_of((2, 1, 1)))


def test_nearest_of_equal_columns_is_the_first_in_any_order():
  a = contrastive.NearestText(jnp.array([1.0, 2.0, 1.0]), jnp.array([5, 5, 5]))
  b = contrastive.NearestText(jnp.array([1.0, 1.0, 2.0]), jnp.array([3, 3, 3]))
  for pair in ((a, b), (b, a)):
    nearest = contrastive.merge_nearest(*pair)
    np.testing.assert_array_equal(nearest.index, [3, 5, 3])


def test_softmax_in_a_ring_or_an_unknown_method_raises():
  with pytest.raises(ValueError, match="method='ring' needs"):
    build_objective("contrastive", dict(loss_type="softmax", method="ring"))
  for name in ("contrastive", "grounding"):
    with pytest.raises(ValueError, match="Did you mean 'ring'"):
      build_objective(name, dict(method="rings"))


def temporaries(name, method, devices, rows=64):
  """Bytes per device of the loss and its gradients, at `rows` per device."""
  mesh = mesh_of((devices, 1, 1))
  split = NamedSharding(mesh, BATCH_SPEC)
  whole = NamedSharding(mesh, PartitionSpec())

  def shape(x, placing):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placing)

  loss_inputs = jax.tree.map(
    lambda x: shape(x, split), random_loss_inputs(name, rows * devices, 16)
  )
  scalars = jax.tree.map(lambda x: shape(x, whole), SCALARS)
  lowered = program(name, method, mesh).lower(loss_inputs, scalars)
  return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["contrastive", "grounding"])
def test_ring_memory_does_not_grow_with_the_devices(name):
  few, many = (temporaries(name, "ring", n) for n in (2, 8))
  # A chunk of 64 columns is 4 kB; with two regions per image it is 8 kB.
  assert many <= few + 2 * 8192, (few, many)
  few, many = (temporaries(name, "gathered", n) for n in (2, 8))
  assert many > 2.5 * few, (few, many)
