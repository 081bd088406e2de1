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
from mtv_jax.train.build_step import build_step_spec
from mtv_jax.train.run import resolve
from mtv_jax.train.spec import ObjectiveWeight
from mtv_jax.train.step import make_program
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

# All of them, for a stack of blocks, are in tests/models/test_remat.py.
CHOICES = (
  "full",
  "mlp_hidden:host,qkv",
  "full|image=qkv,mlp_hidden|caption=attention",
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
  state = make_program(spec, optax.sgd(0.1), mesh).init(params)

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
def test_gradients_of_all_objectives():
  """Local crops, masks, taps, phrases and the MAE decoder."""
  spec = tiny_mtv.built()
  assert str(spec.remat) == "none"
  config = tiny_mtv.read()
  config.model.remat = (
    "full|image=qkv,mlp_hidden|local=attention_out|global=dots|text=mlp_hidden"
    "|box_phrase=none"
  )
  config.objectives.mae.remat = "qkv,mlp_hidden"
  chosen = build_step_spec(resolve(config), total_steps=100)
  assert str(chosen.remat) == config.model.remat
  params = step_samples.params_of(spec)
  batch = tiny_mtv.rows()
  actual = gradients_of(chosen, params, batch, SHAPE)
  expected = gradients_of(spec, params, batch, SHAPE)
  # Rounding of a sum of zero: depth is invariant to shifts.
  expected.pop("heads/depth/conv3/bias")
  actual.pop("heads/depth/conv3/bias")
  assert_near(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "attention"])
def test_gradients_of_splash_attention(remat, monkeypatch):
  """Interpreted, on sequences that are mostly padding."""
  monkeypatch.setattr(attention, "SPLASH_PLATFORMS", ("cpu",))
  monkeypatch.setattr(attention, "SPLASH_LENGTH", 1)
  spec = spec_of(remat)
  params = step_samples.params_of(spec_of("none"))
  spec = dataclasses.replace(spec, runtime=dict(attention="splash"))
  built = {tower.attention for tower in spec.encoders.values()}
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
    build_step_spec(resolve(config), total_steps=100)


@pytest.mark.parametrize(
  ("choice", "message"),
  [
    ("qkv:disk", "'qkv:disk' is none of them"),
    ("full:host", "'full' can be a whole choice only"),
    ("qkv,qkv:host", "names an array twice"),
  ],
)
def test_an_invalid_choice_is_an_error(choice, message):
  with pytest.raises(ConfigError, match=message):
    Remat.parse(choice)


@pytest.mark.parametrize("name", ["captioning", "mae"])
def test_an_unknown_choice_of_a_decoder_names_its_config_key(name):
  message = rf"config.objectives.{name}.remat is 'qvk'.*Did you mean 'qkv'"
  with pytest.raises(ConfigError, match=message):
    build_objective(name, dict(remat="qvk"))
