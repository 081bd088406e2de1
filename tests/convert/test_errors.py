"""Errors for folders and models that can't be converted.

Values of wrong types and ranges are in `tests/hostile`.
"""

import dataclasses
import functools
import json
import shutil

import family_specs
import numpy as np
import pytest
import tower_parity as parity
from safetensors.numpy import load_file, save_file

from mtv_jax.convert import depth_anything, huggingface
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.errors import InputError

_IMAGE, _TEXT = family_specs.EXPORTED, family_specs.TEXT_SPECS
SIGLIP, CLIP = _TEXT["siglip"], _TEXT["clip"]
SQUASH = {"size": 64, "resize": "squash", "interpolation": "bilinear"}


@functools.cache
def make_model(kind):
  spec = ModelSpec.from_config({**_IMAGE, **_TEXT}[kind])
  params = parity.random_params(spec)
  if spec.text is not None:
    leaves = {"logit_scale": np.float32(1), "logit_bias": np.float32(0)}
    params["heads"] = {"contrastive": leaves}
  return ConvertedModel(spec, params, family_specs.preprocess_of(kind))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
  """Copies of exports without our description, by model type."""
  parent = tmp_path_factory.mktemp("exports")

  def get(kind, folder):
    path = parent / kind
    if not path.exists():
      huggingface.write(path, make_model(kind))
      (path / "mtv_jax.json").unlink()
    return shutil.copytree(path, folder / kind)

  return get


def change_json(path, change):
  content = json.loads(path.read_text())
  inner = content.get("vision_config", content)
  (content if "model_type" in change else inner).update(change)
  path.write_text(json.dumps(content))


# ---------------------------------------------------------------------------
# Models that no class can express.


@pytest.mark.parametrize(
  ("fields", "change", "match"),
  [
    (SIGLIP, {"pool": "mean"}, r"SiglipModel.*image\.pool is 'mean'"),
    (SIGLIP, {"registers": 2}, r"image\.registers is 2"),
    (SIGLIP, {"layer_scale": 0.1}, r"image\.layer_scale is 0\.1"),
    (SIGLIP, {"pre_norm": True}, r"image\.pre_norm is True"),
    (SIGLIP, {"patch_bias": False}, r"image\.patch_bias is False"),
    (SIGLIP, {"text": {"causal": True}}, r"text\.causal is True"),
    (SIGLIP, {"text": {"pool": "first"}}, r"text\.pool is 'first'"),
    (
      SIGLIP,
      {"text": {"projection_bias": False}},
      r"text\.projection_bias is False",
    ),
    (CLIP, {"text": {"causal": False}}, r"CLIPModel.*text\.causal is False"),
    (_TEXT["aimv2"], {"pool": "mean"}, r"Aimv2Model.*image\.pool is 'mean'"),
    (_TEXT["tipsv2"], {"text": {"pad_id": None}}, r"text\.pad_id is None"),
    # A CLIPModel has two towers: its fields would be misleading.
    (_IMAGE["dinov2"], {"pre_norm": True}, r"Dinov2Model.*pre_norm is True"),
    (_IMAGE["dinov2"], {"mlp_dim": 100}, r"image\.mlp_dim is 100"),
    (_IMAGE["dinov2"], {"position_resize": "crop"}, r"'bicubic' or 'antial"),
    (
      _IMAGE["dinov3_vit"],
      {"mlp_dim": 100, "rope": {"normalize": "max"}},
      r"rope\.normalize is 'max'",
    ),
    (
      _IMAGE["dinov2_with_registers"],
      {"pool": "mean", "cls_token": True},
      r"image\.pool is 'mean'",
    ),
    (_IMAGE["radio"], {"position_resize": "bicubic"}, r"RadioModel.*'crop'"),
    (
      _IMAGE["aimv2_vision_model"],
      {"projection": 64},
      r"Aimv2VisionModel.*image\.projection is 64",
    ),
  ],
)
def test_models_that_no_class_can_express(fields, change, match, tmp_path):
  text = fields.get("text") and {**fields["text"], **change.get("text", {})}
  spec = ModelSpec.from_config({**fields, **change, "text": text})
  # Checked before the parameters.
  model = ConvertedModel(spec, {"image": {}}, SQUASH)
  with pytest.raises(ConversionError, match=rf"(?s){match}"):
    huggingface.write(tmp_path / "a", model)
  assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"size": 96}, "preprocess.size.*--image_size"),
    ({"crop": "center"}, "preprocess.crop.*squashed"),
  ],
)
def test_preprocessing_that_siglip_can_not_express(change, match, tmp_path):
  model = make_model("siglip")
  odd = dataclasses.replace(model, preprocess={**SQUASH, **change})
  with pytest.raises(ConversionError, match=match):
    huggingface.write(tmp_path / "a", odd)


def test_params_of_another_model(tmp_path):
  model = make_model("siglip")
  image = {**model.params["image"], "extra": np.ones(3, np.float32)}
  del image["patch_embed"]
  odd = dataclasses.replace(model, params={**model.params, "image": image})
  with pytest.raises(ConversionError) as error:
    huggingface.write(tmp_path / "a", odd)
  assert "image/patch_embed/kernel: missing" in str(error.value)
  assert "image/extra: not in the model" in str(error.value)
  head = {"logit_scale": np.float32(1), "logit_bias": np.float32(-10)}
  model = make_model("clip")
  odd = {**model.params, "heads": {"contrastive": head}}
  with pytest.raises(ConversionError, match="CLIPModel has no bias.*-10"):
    huggingface.write(tmp_path / "a", dataclasses.replace(model, params=odd))
  assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------
# Wrong folders.


@pytest.mark.parametrize(
  ("kind", "change", "match"),
  [
    ("siglip", {"image_size": 96}, "image_size"),
    ("siglip", {"num_hidden_layers": 3}, "number of layers"),
    ("siglip", {"intermediate_size": 128}, "sizes"),
    ("siglip", {"model_type": "siglp"}, "Did you mean 'siglip'"),
    ("siglip", {"model_type": "siglip2_text_model"}, "text tower alone"),
    ("dinov3_vit", {"use_gated_mlp": True}, "hidden_act.*'silu'"),
    ("dinov3_vit", {"query_bias": False}, r"key_bias.*\(False, False, True\)"),
    ("dinov3_vit", {"mlp_bias": False}, "mlp_bias=False"),
    ("dinov3_vit", {"num_register_tokens": 3}, "register_tokens"),
    ("dinov3_vit", {"num_hidden_layers": 1}, "number of layers"),
    ("dinov3_vit", {"hidden_size": 128}, "sizes"),
    ("dinov3_vit", {"model_type": "dinov2"}, "embeddings.position_embeddings"),
    ("dinov3_vit", {"model_type": "dinov3_convnext"}, "mean 'dinov3_vit'"),
    ("siglip2_vision_model", {"num_patches": 250}, "250 is not a square"),
    ("siglip2_vision_model", {"hidden_size": 128}, "sizes"),
    ("aimv2_vision_model", {"use_head": False}, "unexpected.*head"),
    ("aimv2_vision_model", {"is_native": True}, "position_embedding"),
    ("radio", {"num_registers": 9}, "cls_token.token"),
    ("radio", {"summary_idxs": [0, 70]}, "pool_tokens"),
    ("radio", {"max_img_size": 128}, "pos_embed"),
    ("radio", {"model_type": "radi"}, "Did you mean 'radio'"),
    ("tipsv2_vision_model", {"num_hidden_layers": 3}, "number of layers"),
    ("tipsv2_vision_model", {"use_swiglu_ffn": True}, "mlp"),
    ("tipsv2_vision_model", {"model_type": "radio"}, "radio_model"),
  ],
)
def test_a_config_of_another_model(exports, tmp_path, kind, change, match):
  folder = exports(kind, tmp_path)
  change_json(folder / "config.json", change)
  with pytest.raises(ValueError, match=rf"(?s){match}"):
    huggingface.read(folder)


@pytest.mark.parametrize(
  ("config", "match"),
  [
    ({"model": {}}, "training run"),
    ({}, "no config.json"),
    ({"architecture": "vit_base_patch16_224"}, "only Perception Encoders"),
    ({"architecture": 3}, "only Perception Encoders"),
    ({"architecture": "vit_pe_core_base_patch16_224"}, "fc1.weight.*missing"),
  ],
)
def test_other_kinds_of_folders(exports, config, match, tmp_path):
  folder = exports("radio", tmp_path)
  (folder / "config.json").unlink()
  if config:
    (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ConversionError, match=match):
    huggingface.read(folder)


def test_each_wrong_tensor_is_named(exports, tmp_path):
  folder = exports("siglip", tmp_path)
  layer = "vision_model.encoder.layers.1"
  file = str(folder / "model.safetensors")
  tensors = load_file(file)
  del tensors[f"{layer}.self_attn.k_proj.bias"]
  tensors["vision_model.extra"] = np.ones(2, np.float32)
  tensors["logit_scale"] = np.ones(3, np.float32)
  save_file(tensors, file)
  with pytest.raises(ConversionError) as error:
    huggingface.read(folder)
  text = str(error.value)
  assert "missing (1)" in text
  assert f"{layer}.self_attn.k_proj.bias" in text
  assert "vision_model.extra" in text
  assert "logit_scale: (3,) in the file, (1,) expected" in text


def test_other_kinds_of_weights(exports, tmp_path):
  folder = exports("siglip", tmp_path)
  weights = folder / "model.safetensors"
  whole = weights.read_bytes()
  weights.write_bytes(whole[:200])
  with pytest.raises(ConversionError, match="not a whole safetensors file"):
    huggingface.read(folder)
  weights.write_text("version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(ConversionError, match="git lfs pull"):
    huggingface.read(folder)
  weights.rename(folder / "pytorch_model.bin")
  with pytest.raises(ConversionError, match="pickles.*save_pretrained"):
    huggingface.read(folder)
  index = {"weight_map": {"logit_scale": "model-00001-of-00002.safetensors"}}
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps(index))
  with pytest.raises(ConversionError, match=r"00001-of-00002.*is missing"):
    huggingface.read(folder)
  with pytest.raises(FileNotFoundError, match="hub, as hf:ORG/NAME"):
    huggingface.read(folder / "google" / "siglip-base-patch16-224")


BACKBONE = {
  "model_type": "dinov2",
  "hidden_size": 32,
  "num_attention_heads": 2,
  "num_hidden_layers": 4,
  "image_size": 28,
  "patch_size": 14,
  "out_indices": [1, 2, -2, 4],
}


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("reassemble_factors", 3),
    ("patch_size", "a"),
    ("backbone_config", "x"),
    ("out_indices", 3),
    ("out_indices", [1, 2, 3, 9]),
    ("out_indices", [0, 1, 2, 3]),
  ],
)
def test_depth_anything_configs(field, value):
  names = ["backbone.embeddings.cls_token"]
  config = {"backbone_config": BACKBONE, "reassemble_hidden_size": 32}
  assert depth_anything.read_spec(config, names).layers == (0, 1, 2, 3)
  if field == "out_indices":
    config["backbone_config"] = BACKBONE | {field: value}
  else:
    config[field] = value
  with pytest.raises(InputError, match=field):
    depth_anything.read_spec(config, names)


# ---------------------------------------------------------------------------
# Image processors.


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
  ("kind", "processor", "expected"),
  [
    (
      "siglip",
      {"size": {"height": 64, "width": 64}, "resample": 2},
      {"size": 64, "resize": "squash", "interpolation": "bilinear"},
    ),
    # As So400m/14 at 384: pixels that fill no patch are dropped.
    (
      "siglip",
      {"size": {"height": 70, "width": 70}, "resample": 3},
      {"size": 64, "interpolation": "bicubic"},
    ),
    (
      "siglip",
      {"size": 64, "do_rescale": False, "do_normalize": False},
      {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3},
    ),
    (
      "siglip",
      {"size": {"shortest_edge": 72}, "do_center_crop": True, "crop_size": 64},
      {"size": 64, "resize": "shortest", "crop": "center", "resize_size": 72},
    ),
    (
      "dinov3_vit",  # As on the Hub, with nulls.
      {
        "crop_size": None,
        "do_center_crop": None,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.4],
        "image_std": [0.229, 0.224, 0.2],
        "resample": 2,
        "size": {"height": 96, "width": 96},
      },
      {"size": 96, "resize": "squash", "std": (0.229, 0.224, 0.2)},
    ),
    (
      "dinov3_vit",
      None,
      {"size": 64, "resize": "squash", "mean": (0.485, 0.456, 0.406)},
    ),
  ],
)
def test_processors(exports, kind, processor, expected, version, tmp_path):
  folder = exports(kind, tmp_path)
  path = folder / "preprocessor_config.json"
  path.unlink()
  if version == 5:
    path = folder / "processor_config.json"
    processor = {"image_processor": processor}
  if processor:
    path.write_text(json.dumps(processor))
  fields = huggingface.read(folder).preprocess
  assert {k: fields[k] for k in expected} == expected
  Preprocess.from_dict(fields)
