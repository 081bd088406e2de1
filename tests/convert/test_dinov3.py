"""DINOv3 and exports of self-distilled towers against transformers."""

import json
import logging

import numpy as np
import PIL.Image
import pytest
import tower_parity as parity

import mtv_jax
from mtv_jax.convert import huggingface
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models.two_tower import ModelSpec

reference = pytest.mark.reference
# Deprecations inside transformers.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TINY = {
  "hidden_size": 48,
  "intermediate_size": 96,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "image_size": 64,
}
KINDS = {
  "plain": {"num_register_tokens": 2},
  "gated": {
    "num_register_tokens": 3,
    "use_gated_mlp": True,
    "hidden_act": "silu",
    "rope_theta": 50.0,
    "pos_embed_rescale": None,
    "pos_embed_shift": 0.1,
  },
  "no biases": {"query_bias": False, "value_bias": False},
  "all biases": {"key_bias": True, "layerscale_value": 1e-5},
}
# The published sizes.
TRUE = {
  "S": {"num_register_tokens": 4},
  "S+": {
    "num_register_tokens": 4,
    "use_gated_mlp": True,
    "hidden_act": "silu",
  },
  "B": {
    "num_register_tokens": 4,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
  },
}


def _saved(folder, *, scale=0.1, **config):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  config = transformers.DINOv3ViTConfig(**config)
  model = parity.add_noise(transformers.DINOv3ViTModel(config), scale=scale)
  model.save_pretrained(folder)
  return model


def _difference(theirs, ours, *sizes):
  import torch

  worst = 0.0
  for height, width in sizes:
    images = parity.pixels(2, height, width)
    with torch.no_grad():
      expected = theirs(parity.as_torch(images), output_hidden_states=True)
    pairs = parity.image_pairs(parity.run_image(ours, images), expected)
    worst = max(worst, parity.largest_difference(pairs))
  return worst


@reference
@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_towers_equal_transformers(kind, tmp_path, record_property):
  model = _saved(tmp_path / "a", **TINY, **KINDS[kind])
  ours = huggingface.read(tmp_path / "a")
  sizes = ((64, 64), (96, 64), (48, 160)) if kind == "gated" else ((64, 96),)
  record_property("difference", _difference(model, ours, *sizes))
  again = huggingface.write(tmp_path / "b", ours)
  back = huggingface.read(again)
  assert back.spec == ours.spec
  got, want = map(Preprocess.from_dict, (back.preprocess, ours.preprocess))
  assert got == want
  parity.assert_same_params(back.params, ours.params)
  (again / "mtv_jax.json").unlink()
  plain = huggingface.read(again)
  assert plain.spec == ours.spec
  opened = parity.assert_loads_whole(again, "DINOv3ViTModel")
  state = opened.state_dict()
  for name, value in model.state_dict().items():
    np.testing.assert_array_equal(state[name], value, err_msg=name)


@reference
@quiet
@pytest.mark.slow
@pytest.mark.parametrize("kind", TRUE)
def test_towers_of_true_shapes_equal_transformers(
  kind, tmp_path, record_property
):
  model = _saved(tmp_path, scale=0.01, **TRUE[kind])
  ours = huggingface.read(tmp_path)
  difference = _difference(model, ours, (224, 224), (256, 160))
  record_property("difference", difference)
  print(f"DINOv3 {kind}: largest difference {difference:.2e}")


EXPORTS = {
  "dino": ({"layer_scale": None, "gelu": "exact"}, "Dinov2Model"),
  "dinov2": (
    {"layer_scale": 0.1, "mask_token": True, "mlp": "swiglu", "mlp_dim": 128},
    "Dinov2Model",
  ),
  "registers": ({"registers": 2}, "Dinov2WithRegistersModel"),
  "mae": ({"positions": "sincos", "norm_eps": 1e-5}, "Dinov2Model"),
  "dinov3": (
    {"positions": "rope", "registers": 2, "rope": {"jitter": 1.5}},
    "DINOv3ViTModel",
  ),
  "dinov3 without registers": (
    {"positions": "rope", "layer_scale": 0.1, "mlp": "swiglu", "mlp_dim": 120},
    "DINOv3ViTModel",
  ),
}
SQUASH = {"size": 64, "resize": "squash", "interpolation": "bilinear"}
CROP = {
  "size": 64,
  "resize": "shortest",
  "resize_size": 72,
  "crop": "center",
  "interpolation": "bicubic",
}


def _export(folder, fields, preprocess=SQUASH):
  spec = ModelSpec.from_config(
    {"variant": "mu/16", "image_size": 64, "pool": "cls", **fields}
  )
  params = parity.random_params(spec)
  params["heads"] = {"dino": {"k": np.ones((2, 2), np.float32)}}
  model = ConvertedModel(spec, params, preprocess)
  return model, huggingface.write(folder, model)


@pytest.mark.parametrize("kind", EXPORTS)
def test_exports_of_towers_with_a_cls_token_are_restored(kind, tmp_path):
  fields, _ = EXPORTS[kind]
  model, folder = _export(tmp_path / "a", fields)
  back = huggingface.read(folder)
  stored = model.store_positions()
  assert back.spec == stored.spec
  parity.assert_same_params(back.params, stored.params)


@reference
@quiet
@pytest.mark.parametrize("preprocess", [SQUASH, CROP], ids=["squash", "crop"])
@pytest.mark.parametrize("kind", EXPORTS)
def test_transformers_opens_towers_with_a_cls_token(
  kind, preprocess, tmp_path, caplog
):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  fields, class_name = EXPORTS[kind]
  _, folder = _export(tmp_path / "a", fields, preprocess)
  root = logging.getLogger("transformers")
  root.addHandler(caplog.handler)
  try:
    theirs = parity.assert_loads_whole(folder, class_name)
    processor = transformers.AutoImageProcessor.from_pretrained(
      folder, backend="pil"
    )
  finally:
    root.removeHandler(caplog.handler)
  assert [r.getMessage() for r in caplog.records] == []
  image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
  inputs = processor(images=[PIL.Image.fromarray(image)], return_tensors="pt")
  with torch.no_grad():
    expected = theirs(**inputs, output_hidden_states=True)
  ours = huggingface.read(folder)
  images = Preprocess.from_dict(ours.preprocess)(image)[None]
  np.testing.assert_array_equal(
    images, inputs["pixel_values"].numpy().transpose(0, 2, 3, 1)
  )
  pairs = parity.image_pairs(parity.run_image(ours, images), expected)
  parity.largest_difference(pairs)
  encoder = mtv_jax.load(folder)
  np.testing.assert_allclose(
    encoder.image([image]).pooled,
    expected.pooler_output.numpy(),
    atol=parity.TOLERANCE,
  )


def test_a_trained_neutral_parameter_is_no_longer_left_out(tmp_path):
  """A layer scale of ones that another program trained on is named."""
  from safetensors.numpy import load_file, save_file

  _, folder = _export(tmp_path / "a", {})
  file = str(folder / "model.safetensors")
  tensors = load_file(file)
  tensors["encoder.layer.0.layer_scale1.lambda1"][:] = 2
  save_file(tensors, file)
  with pytest.raises(ConversionError, match="blocks/scale1"):
    huggingface.read(folder)


@pytest.mark.parametrize(
  ("field", "value", "match"),
  [
    ("pool", "mean", r"image\.pool is 'mean'"),
    ("mlp_dim", 100, r"image\.mlp_dim is 100"),
    ("rope", {"normalize": "max"}, r"rope\.normalize is 'max'"),
  ],
)
def test_towers_that_no_class_can_express(field, value, match, tmp_path):
  fields = {"cls_token": True, "registers": 2, field: value}
  if field == "rope":
    fields |= {"positions": "rope", "mlp_dim": 100}
  with pytest.raises(ConversionError, match=match):
    _export(tmp_path / "a", fields)


def _folder(folder, **change):
  """A DINOv3 folder, without transformers."""
  _, path = _export(folder, {"positions": "rope", "qkv_bias": "query_value"})
  (path / "mtv_jax.json").unlink()
  config = json.loads((path / "config.json").read_text()) | change
  (path / "config.json").write_text(json.dumps(config))
  return path


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"hidden_act": "swish"}, "hidden_act='swish'"),
    ({"use_gated_mlp": True}, "hidden_act.*'silu'"),
    ({"query_bias": False}, r"query_bias, key_bias.*\(False, False, True\)"),
    ({"mlp_bias": False}, "mlp_bias=False"),
    ({"num_register_tokens": 3}, "register_tokens"),
    ({"num_hidden_layers": 1}, "number of layers"),
    ({"hidden_size": 128}, "sizes"),
    ({"rope_theta": -1}, "rope_theta"),
    ({"model_type": "dinov2"}, "embeddings.position_embeddings"),
    ({"model_type": "dinov3_convnext"}, "Did you mean 'dinov3_vit'"),
  ],
)
def test_wrong_folders_are_named(change, match, tmp_path):
  with pytest.raises(ValueError, match=match):
    huggingface.read(_folder(tmp_path / "a", **change))


def test_the_image_processor_is_read(tmp_path):
  folder = _folder(tmp_path / "a")
  ours = huggingface.read(folder)
  assert ours.spec.image.qkv_bias == "query_value"
  # As on the Hub, with nulls.
  fields = {
    "crop_size": None,
    "do_center_crop": None,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "size": {"height": 96, "width": 96},
  }
  path = folder / "preprocessor_config.json"
  for content, size in ((fields, 96), (None, 64)):
    path.unlink()
    if content:
      path.write_text(json.dumps(content))
    else:
      path = path.with_name("none")
    preprocess = Preprocess.from_dict(huggingface.read(folder).preprocess)
    assert preprocess == Preprocess(
      size, "squash", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
