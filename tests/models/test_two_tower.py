"""Specs, variants, and the parameter tree that dependent code relies on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mtv_jax.config import sections
from mtv_jax.models import two_tower as model_lib
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.utils.tree import flatten_with_names

CONFIG = dict(
  variant="mu/8", image_size=32, pool="map", dtype="bfloat16", remat="dots",
  scan=True,
  text=dict(
    variant="mu", length=12, vocab_size=300, pool="last", tokenizer="bytes",
    clean="lower",
  ),
)  # fmt: skip


def norm(name, width):
  return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def dense(name, inputs, outputs):
  return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}


def block_shapes(depth, d, mlp, **more):
  shapes = (
    norm("norm1", d)
    | dense("attention/qkv", d, 3 * d)
    | dense("attention/out", d, d)
    | norm("norm2", d)
    | dense("mlp/fc1", d, mlp)
    | dense("mlp/fc2", mlp, d)
    | more
  )
  return {f"blocks/{name}": (depth, *s) for name, s in shapes.items()}


def shapes_of(tree):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(p.key for p in path): leaf.shape for path, leaf in flat}


def test_parameter_tree_siglip():
  """Checkpoints, conversion and sharding rules rest on these names."""
  params = model_lib.abstract_params(ModelSpec.from_config(CONFIG))
  assert set(params) == {"image", "text"}
  common = block_shapes(2, 64, 256) | norm("norm", 64)
  assert shapes_of(params["image"]) == (
    {"position_embedding": (16, 64), "pool/probe": (64,), **common}
    | dense("patch_embed", 192, 64)
    | dense("pool/attention/q", 64, 64)
    | dense("pool/attention/kv", 64, 128)
    | dense("pool/attention/out", 64, 64)
    | norm("pool/norm", 64)
    | dense("pool/mlp/fc1", 64, 256)
    | dense("pool/mlp/fc2", 256, 64)
  )
  assert shapes_of(params["text"]) == {
    "token_embedding": (300, 64),
    "position_embedding": (12, 64),
    **common,
    **dense("projection", 64, 64),
  }


def test_parameter_tree_clip_and_dinov2():
  shape = dict(
    image_size=28, patch_size=14, width=48, depth=3, heads=4, mlp_dim=80,
    pool="cls", cls_token=True,
  )  # fmt: skip
  clip = ViTSpec(**shape, pre_norm=True, patch_bias=False, projection=20)
  dinov2 = ViTSpec(
    **shape, registers=4, layer_scale=1e-5, mask_token=True, mlp="swiglu"
  )
  text = TextSpec(
    vocab_size=9, width=48, depth=1, heads=4, mlp_dim=80, projection=20,
    projection_bias=False,
  )  # fmt: skip
  want = {
    "patch_embed/kernel": (588, 48),
    "position_embedding": (4, 48),
    "cls_token": (48,),
    **norm("norm", 48),
  }
  params = model_lib.abstract_params(ModelSpec(image=clip, text=text))
  assert shapes_of(params["image"]) == {
    **want,
    **block_shapes(3, 48, 80),
    **norm("pre_norm", 48),
    "projection/kernel": (48, 20),
  }
  assert "projection/bias" not in shapes_of(params["text"])
  params = model_lib.abstract_params(ModelSpec(image=dinov2))
  assert set(params) == {"image"}
  more = {"scale1": (48,), "scale2": (48,), **dense("mlp/gate", 48, 80)}
  assert shapes_of(params["image"]) == {
    **want,
    **block_shapes(3, 48, 80, **more),
    "patch_embed/bias": (48,),
    "registers": (4, 48),
    "mask_token": (48,),
  }


@pytest.mark.parametrize(
  "variant, fields, published",
  [
    ("Ti/16", {}, 5_524_416),
    ("S/16", {}, 21_665_664),
    ("B/16", {}, 85_798_656),
    ("L/16", {}, 303_301_632),
    (
      "g-opt/14",
      {"image_size": 518, "heads": 24, "mlp": "swiglu", "mlp_dim": 4096}
      | {"layer_scale": 1e-5, "mask_token": True},
      1_136_480_768,
    ),
  ],
)
def test_variants_have_the_published_size(variant, fields, published):
  """timm's counts without the classifier, DINOv2's giant as the last."""
  config = {"variant": variant, "pool": "cls", **fields}
  params = model_lib.abstract_params(ModelSpec.from_config(config))["image"]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  # They have a position embedding for the CLS token.
  assert count + params["cls_token"].size == published


def test_from_config():
  spec = ModelSpec.from_config(ConfigDict(CONFIG))
  assert spec.image.patch_size == 8
  assert (spec.image.width, spec.image.depth) == (64, 2)
  assert spec.text.projection == spec.embed_dim == 64
  assert not spec.image.cls_token
  assert spec == ModelSpec.from_config(CONFIG)
  config = sections.read(model_lib.ModelConfig, CONFIG, "config.model")
  assert config.spec == spec
  assert config.runtime == dict(
    dtype="bfloat16", remat="dots", scan=True, attention="auto",
    quantization="none", drop_path=0.0, drop_path_uniform=True,
  )  # fmt: skip
  # Given values override the variant's; a CLS pool adds a CLS token.
  spec = ModelSpec.from_config(
    {"variant": "mu/16", "depth": 5, "pool": "cls", "projection": 10}
    | {"text": {"variant": "Ti", "length": 7}}
  )
  assert (spec.image.depth, spec.image.width) == (5, 64)
  assert spec.image.cls_token
  assert (spec.text.width, spec.text.projection) == (192, 10)
  without = ModelSpec.from_config({"variant": "B/16", "text": None})
  assert without.text is None
  assert ViTSpec() == dataclasses.replace(without.image)


def test_json_round_trip():
  for spec in (
    ModelSpec.from_config(CONFIG),
    ModelSpec(image=ViTSpec(layer_scale=1e-5, projection=None)),
  ):
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
  other = ModelSpec(image=ViTSpec(layer_scale=1e-4))
  assert other != spec


@pytest.mark.parametrize(
  "config, message",
  [
    ({"variant": "Bb/16"}, "Unknown variant 'Bb/16'.*Did you mean 'B'"),
    ({"variant": "B/x"}, "patch size of variant 'B/x'.*'B/16'"),
    ({"variant": "B/0"}, "is not a number: write 'B/16'"),
    ({"variant": "B"}, "names no patch size.*'B/16'"),
    ({"variant": "B/16", "text": {"variant": "B/16"}}, "write 'B'"),
    (
      {"variant": "B/16", "registres": 4},
      "model has no option 'registres'.*'registers'",
    ),
    (
      {"variant": "B/16", "text": {"lenght": 4}},
      "model.text has no option 'lenght'.*'length'",
    ),
    ({"variant": "B/16", "depth": "deep"}, "model.depth is 'deep'"),
    ({"variant": "B/16", "gelu": "x"}, "^config.model.gelu is 'x'"),
    ({"variant": "B/16", "width": 100}, "^config.model.width 100 is not div"),
    (
      {"variant": "B/16", "text": {"variant": "B", "pool": "map"}},
      "^config.model.text.pool is 'map'",
    ),
    ({"variant": "B/16", "image_size": 225}, "225x225.*224x224"),
    (
      {"variant": "B/16", "text": {"variant": "B", "projection": 512}},
      "Image embeddings have 768 channels, but text embeddings 512",
    ),
  ],
)
def test_bad_configs(config, message):
  with pytest.raises(ValueError, match=message):
    ModelSpec.from_config(config)


@pytest.mark.parametrize(
  "function, args, message",
  [
    (ModelSpec.from_dict, [{"vision": {}}], "no option 'vision'"),
    (ModelSpec.from_dict, [{"image": {"widht": 8}}], "'widht'.*'width'"),
    (model_lib.text_tower, [ModelSpec(image=ViTSpec())], "no text tower"),
    (
      model_lib.init_params,
      [ModelSpec.from_config(CONFIG), jax.random.key(0), "dino2"],
      "Did you mean 'dinov2'",
    ),
  ],
)
def test_bad_arguments(function, args, message):
  with pytest.raises(ValueError, match=message):
    function(*args)


@pytest.mark.parametrize("option", ["remat", "attention", "quantization"])
def test_bad_options_of_towers(option):
  with pytest.raises(ValueError, match=f"{option} is 'no'"):
    model_lib.image_tower(ModelSpec(image=ViTSpec()), **{option: "no"})


# Standard deviations by parameter; a limit of a uniform is over sqrt(3).
D, PATCH, MLP = 64, 192, 256
TORCH = {n: (3 * n) ** -0.5 for n in (D, PATCH, MLP)}
SCHEMES = {
  "big_vision": {
    "image/blocks/attention/qkv/kernel": 1 / 8,
    "image/blocks/attention/qkv/bias": 0,
    "image/blocks/attention/out/kernel": 1 / 8,
    "image/blocks/mlp/fc1/kernel": (2 / (D + MLP)) ** 0.5,
    "image/blocks/mlp/fc1/bias": 1e-6,
    "image/pool/attention/kv/kernel": 1 / 8,
    "image/position_embedding": 1 / 8,
    "image/patch_embed/kernel": PATCH**-0.5,
    "text/token_embedding": 0.02,
    "text/position_embedding": 0.01,
    "text/projection/kernel": 1 / 8,
  },
  "siglip": {
    "text/token_embedding": 1 / 8,
    "text/position_embedding": 1 / 8,
    "image/position_embedding": 1 / 8,
  },
  "dinov2": {
    "image/patch_embed/kernel": TORCH[PATCH],
    "image/patch_embed/bias": TORCH[PATCH],
    "image/position_embedding": 0.02,
    "image/cls_token": 0.02,
    "image/registers": 1e-6,
    "image/blocks/attention/qkv/kernel": 0.02,
    "image/blocks/mlp/fc2/kernel": 0.02,
    "image/blocks/mlp/fc1/bias": 0,
    "text/token_embedding": 0.02,
  },
  "dinov3": {"image/registers": 0.02, "image/blocks/mlp/fc1/kernel": 0.02},
  "mae": {
    "image/patch_embed/kernel": (2 / (PATCH + D)) ** 0.5,
    "image/patch_embed/bias": TORCH[PATCH],
    "image/cls_token": 0.02,
    "image/blocks/attention/qkv/kernel": (2 / (4 * D)) ** 0.5,
    "image/blocks/mlp/fc1/kernel": (2 / (D + MLP)) ** 0.5,
    "image/blocks/mlp/fc1/bias": 0,
  },
  "clip": {
    "image/patch_embed/kernel": TORCH[PATCH],
    "image/cls_token": 2**0.5 / 8,
    "image/position_embedding": 1 / 8,
    "image/blocks/attention/qkv/kernel": (2 / (4 * D)) ** 0.5,
    "image/blocks/attention/qkv/bias": 0,
    "image/blocks/attention/out/kernel": TORCH[D],
    "image/blocks/attention/out/bias": 0,
    "image/blocks/mlp/fc1/kernel": TORCH[D],
    "image/blocks/mlp/fc2/kernel": TORCH[MLP],
    "image/blocks/mlp/fc2/bias": TORCH[MLP],
    "text/token_embedding": 0.02,
    "text/position_embedding": 0.01,
    "text/blocks/attention/qkv/kernel": 1 / 8,
    "text/blocks/attention/out/kernel": 1 / 16,
    "text/blocks/mlp/fc1/kernel": 128**-0.5,
    "text/blocks/mlp/fc2/kernel": 1 / 16,
    "text/projection/kernel": 1 / 8,
  },
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_init_schemes(scheme):
  """Deviations of the references, for a text tower of two layers."""
  fields = dict(CONFIG, cls_token=True, registers=4)
  spec = ModelSpec.from_config(fields)
  assert spec.text.depth == 2
  rng = jax.random.key(0)
  params = dict(flatten_with_names(model_lib.init_params(spec, rng, scheme)))
  default = dict(flatten_with_names(model_lib.init_params(spec, rng)))
  assert params.keys() == default.keys()
  for name, std in SCHEMES[scheme].items():
    rtol = 0.25 if params[name].size < 500 else 0.1
    np.testing.assert_allclose(
      np.sqrt(np.mean(np.square(params[name]))), std, rtol=rtol, err_msg=name
    )
    if scheme in ("big_vision", "mae") and "attention/qkv/kernel" in name:
      largest = np.abs(params[name]).max() / (3**0.5 * std)
      assert 0.98 < largest <= 1.0001  # Uniform.
  for name in ("image/norm/scale", "text/blocks/norm1/scale"):
    np.testing.assert_array_equal(params[name], 1)
  assert {x.dtype for x in params.values()} == {jnp.dtype("float32")}
  # Layers and towers have different parameters.
  first, second = params["image/blocks/mlp/fc1/kernel"]
  for other in (second, params["text/blocks/mlp/fc1/kernel"][0]):
    assert np.abs(first - other).max() > 0.01
