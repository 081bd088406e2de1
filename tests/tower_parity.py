"""Comparison of towers with transformers and timm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.convert.model import ConvertedModel
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.models import two_tower
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

TOLERANCE = 1e-4


def tower(width, depth, heads, mlp_dim, **more):
  """Section of a transformers config."""
  return {
    "hidden_size": width,
    "num_hidden_layers": depth,
    "num_attention_heads": heads,
    "intermediate_size": mlp_dim,
    **more,
  }


def add_noise(model, *, seed=0, scale=0.1):
  """Adds noise to a torch model, so that no parameter is zero or one."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.add_(scale * noise)
  return model.eval()


def save_model(
  folder,
  class_name,
  *,
  scale=0.1,
  dtype=None,
  change=None,
  options=(),
  **config,
):
  """Saves a model of transformers of random weights, and returns it.

  `options` go to `save_pretrained`, `change` changes the model.
  """
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  kind = getattr(transformers, class_name)
  model = kind(kind.config_class(**config))
  # TIPSv2 divides by its temperature.
  temperature = getattr(model, "temperature", None)
  before = temperature is not None and temperature.detach().clone()
  model = add_noise(model, scale=scale)
  if temperature is not None:
    temperature.data.copy_(before)
  if change:
    change(model)
  model = model.to(dtype or torch.float32)
  model.save_pretrained(folder, **dict(options))
  return model


def remove_normalization(model):
  """RADIO normalises pixels itself; the towers are compared after that."""
  if hasattr(model, "input_conditioner"):
    model.make_preprocessor_external()


def random_params(spec, *, seed=0):
  """Random parameters of a spec, never zero or one.

  Parameters fixed at zero (biases of keys) are zero.
  """
  rng = np.random.default_rng(seed)
  leaves = {}
  for name, leaf in flatten_with_names(two_tower.abstract_params(spec)):
    scale = np.float32(0.02 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5)
    value = rng.normal(size=leaf.shape).astype(np.float32) * scale
    leaves[name] = value + ("scale" in name)
  name = "image/blocks/attention/qkv/bias"
  if spec.image.qkv_bias == "query_value":
    depth, heads = spec.image.depth, spec.image.heads
    parts = leaves[name].reshape(depth, heads, 3, -1)
    parts[:, :, 1] = 0
  return unflatten_names(leaves)


def pixels(batch, height, width, *, seed=1):
  """Normalised images `[batch, height, width, 3]`."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(batch, height, width, 3)).astype(np.float32)


def as_torch(images):
  """Images with the channels first."""
  import torch

  return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@functools.cache
def _apply_fn(tower, **options):
  return jax.jit(lambda p, x: tower.apply({"params": p}, x, **options))


def run_image(model, images):
  """Output of the image tower of a `ConvertedModel` with all its layers."""
  params = jax.tree.map(jnp.asarray, model.params["image"])
  layers = tuple(range(model.spec.image.depth))
  apply_fn = _apply_fn(two_tower.image_tower(model.spec), layers=layers)
  return apply_fn(params, jnp.asarray(images))


def run_text(model, tokens):
  """Output of the text tower."""
  params = jax.tree.map(jnp.asarray, model.params["text"])
  return _apply_fn(two_tower.text_tower(model.spec))(
    params, jnp.asarray(tokens)
  )


def largest_difference(pairs):
  """The largest difference of arrays `{name: (ours, theirs)}`, checked."""
  worst = 0.0
  for name, (ours, theirs) in pairs.items():
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, name
    assert np.ptp(theirs) > 1e-3, name
    difference = float(np.abs(ours - theirs).max())
    assert difference <= TOLERANCE, f"{name}: {difference:.2e}"
    worst = max(worst, difference)
  return worst


def image_pairs(out, theirs):
  """Arrays to compare of `ImageOutput` and transformers' output."""
  tokens = np.concatenate([out.prefix, out.patches], axis=1)
  pairs = {"last": (tokens, theirs.last_hidden_state)}
  for layer, tokens in out.intermediates.items():
    pairs[f"layer {layer}"] = (tokens, theirs.hidden_states[layer + 1])
  if getattr(theirs, "pooler_output", None) is not None:
    pairs["pooled"] = (out.pooled, theirs.pooler_output)
  return pairs


def assert_same_params(got, want):
  """The parameters are identical."""
  got, want = (dict(flatten_with_names(tree)) for tree in (got, want))
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name].dtype == np.float32
    np.testing.assert_array_equal(got[name], value, err_msg=name)


def spec_model(fields):
  """A converted model with random weights."""
  spec = two_tower.ModelSpec.from_config(fields)
  heads = {"contrastive": {"logit_scale": np.float32(2.0)}}
  params = {**random_params(spec), "heads": heads}
  preprocess = {"size": 64, "resize": "squash"}
  return ConvertedModel(spec, params, preprocess, TokenizerFiles(None))
