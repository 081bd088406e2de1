"""Gradients of the step under every choice of remat, and splash attention."""

import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import optax
import pytest
import step_samples
import tiny_mtv
from step_samples import dino, make_batch, make_spec, mesh_of

from mtv_jax.models import attention
from mtv_jax.models.remat import Remat
from mtv_jax.objectives import build_objective
from mtv_jax.parallel.mesh import replicated_sharding, shard_batch
from mtv_jax.train import gradients
from mtv_jax.train.config import resolve
from mtv_jax.train.run import build_spec
from mtv_jax.train.spec import ObjectiveWeight
from mtv_jax.train.step import make_train_step
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

# All of them, for a stack of blocks, are in tests/models/test_remat.py, and
# all objectives in test_mtv_recipe.py.
CHOICES = (
  "mlp_hidden:host,qkv",
  pytest.param("full", marks=pytest.mark.long),
  pytest.param("full|image=qkv|caption=attention", marks=pytest.mark.long),
)
SHAPE = (2, 2, 2)


@functools.cache
def spec_of(remat):
  """Contrast and DINO on one view."""
  return make_spec(
    objectives={
      "contrastive": build_objective("contrastive", dict(init_bias=-2.0)),
      "dino": dino(),
    },
    weights={n: ObjectiveWeight(1.0) for n in ("contrastive", "dino")},
    remat=Remat.parse(remat),
  )


def gradients_of(spec, params, batch, shape):
  mesh = mesh_of(shape)
  state = make_train_step(spec, optax.sgd(0.1), mesh).init(params)

  @functools.partial(jax.jit, out_shardings=replicated_sharding(mesh))
  def compute(state, batch):
    return gradients.compute_gradients(spec, state, batch, mesh)[1]

  grads = jax.device_get(compute(state, shard_batch(batch, mesh)))
  return dict(flatten_with_names(grads))


@functools.cache
def contrast_and_dino(remat, shape):
  params = step_samples.params_of(spec_of("none"))
  return gradients_of(spec_of(remat), params, make_batch(), shape)


def assert_near(actual, expected):
  assert actual.keys() == expected.keys()
  for name, grad in expected.items():
    error = np.linalg.norm(actual[name] - grad)
    assert error <= 1e-5 * np.linalg.norm(grad) + 1e-8, name


@pytest.mark.slow
@pytest.mark.parametrize("remat", CHOICES)
def test_gradients_do_not_depend_on_what_is_saved(remat):
  expected = contrast_and_dino("none", (1, 1, 1))
  assert_near(contrast_and_dino(remat, SHAPE), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
  "remat", [pytest.param("none", marks=pytest.mark.long), "attention"]
)
def test_gradients_of_splash_attention(remat, monkeypatch):
  """Interpreted, on sequences that are mostly padding."""
  monkeypatch.setattr(attention, "SPLASH_PLATFORMS", ("cpu",))
  monkeypatch.setattr(attention, "SPLASH_LENGTH", 1)
  spec = spec_of(remat)
  params = step_samples.params_of(spec_of("none"))
  spec = dataclasses.replace(spec, runtime=dict(attention="splash"))
  built = {tower.attention for tower in spec.towers.values()}
  assert built == {"splash"}
  expected = contrast_and_dino("none", (1, 1, 1))
  assert_near(gradients_of(spec, params, make_batch(), SHAPE), expected)


@pytest.mark.slow
def test_gradients_of_attention_in_blocks(monkeypatch):
  """As long sequences take it on CPUs."""
  monkeypatch.setattr(attention, "CPU_BLOCKWISE_LENGTH", 1)
  monkeypatch.setattr(attention, "CPU_BLOCK", 16)
  in_blocks = mock.Mock(wraps=attention.cpu_attention)
  monkeypatch.setattr(attention, "cpu_attention", in_blocks)
  spec = dataclasses.replace(spec_of("full"), runtime=dict(attention="xla"))
  params = step_samples.params_of(spec_of("none"))
  expected = contrast_and_dino("none", (1, 1, 1))
  assert_near(gradients_of(spec, params, make_batch(), SHAPE), expected)
  assert in_blocks.called


def test_an_encoding_that_is_not_trained_is_an_error():
  config = tiny_mtv.read()
  config.model.remat = "full|globals=qkv"
  with pytest.raises(ConfigError, match="'globals=qkv'.*box_phrase, caption"):
    build_spec(resolve(config), total_steps=100)


@pytest.mark.parametrize(
  ("read", "choice", "message"),
  [
    (Remat.parse, "qkv:disk", "unknown 'qkv:disk'"),
    (Remat.parse, "full:host", "'full' can only be a whole choice"),
    (Remat.parse, "qkv,qkv:host", "names an array twice"),
    ("captioning", "qvk", "objectives.captioning.remat is 'qvk'.*mean 'qkv'"),
    ("mae", "qvk", "config.objectives.mae.remat is 'qvk'.*Did you mean 'qkv'"),
  ],
)
def test_an_invalid_choice_is_an_error(read, choice, message):
  with pytest.raises(ConfigError, match=message):
    if isinstance(read, str):
      build_objective(read, dict(remat=choice))
    else:
      read(choice)
