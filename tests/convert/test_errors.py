"""Errors for folders and models that can't be converted.

Values of wrong types and ranges are in `tests/hostile`.
"""

import copy
import dataclasses
import functools
import json
import re
import shutil

import family_specs
import numpy as np
import pytest
import tower_parity as parity
from safetensors.numpy import load_file, save_file

from mtv_jax.convert import huggingface
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models.two_tower import ModelSpec

_IMAGE, _TEXT = family_specs.EXPORTED, family_specs.TEXT_SPECS
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
  ("kind", "change", "match"),
  [
    ("siglip", {"pool": "mean"}, r"SiglipModel.*image\.pool is 'mean'"),
    ("siglip", {"registers": 2}, r"image\.registers is 2"),
    ("siglip", {"layer_scale": 0.1}, r"image\.layer_scale is 0\.1"),
    ("siglip", {"pre_norm": True}, r"image\.pre_norm is True"),
    ("siglip", {"patch_bias": False}, r"image\.patch_bias is False"),
    ("siglip", {"pool_mlp_dim": 32}, r"pool_mlp_dim is 32 but must be None or"),
    (
      "siglip",
      {"mlp_norm": True, "pool_norm": True},
      r"image\.pool_norm is True.*image\.mlp_norm is True",
    ),
    ("siglip", {"text.causal": True}, r"text\.causal is True"),
    ("siglip", {"text.pool": "first"}, r"text\.pool is 'first'"),
    ("siglip", {"text.projection_bias": False}, r"text\.projection_bias is F"),
    ("clip", {"text.causal": False}, r"CLIPModel.*text\.causal is False"),
    ("aimv2", {"pool": "mean"}, r"Aimv2Model.*image\.pool is 'mean'"),
    ("tipsv2", {"text.pad_id": None}, r"text\.pad_id is None"),
    ("dinov2", {"pre_norm": True}, r"CLIPVisionModel.*patch_bias is True"),
    ("dinov2", {"mlp_dim": 100}, r"image\.mlp_dim is 100.*to_stablehlo"),
    (
      "dinov2",
      {"positions": "learned_rope", "pool_norm": True},
      r"transformers' \w+Model can't.*EVA-02 and .* only read.*to_stablehlo",
    ),
    (
      "dinov2",
      {"positions": "learned_rope", "pre_norm": True},
      r"can't express.*Train with these settings",
    ),
    ("dinov2", {"position_resize": "crop"}, r"'bicubic' or 'antial"),
    ("dinov3_vit", {"rope": {"normalize": "max"}}, r"rope\.normalize is 'max'"),
    (
      "dinov2_with_registers",
      {"pool": "mean", "cls_token": True},
      r"image\.pool is 'mean'",
    ),
    ("radio", {"position_resize": "bicubic"}, r"RadioModel.*'crop'"),
    ("aimv2_vision_model", {"projection": 64}, r"Aimv2VisionModel.*tion is 64"),
  ],
)
def test_models_that_no_class_can_express(
  kind, change, match, tmp_path, caplog
):
  fields = copy.deepcopy({**_IMAGE, **_TEXT}[kind])
  for name, value in change.items():
    section, _, field = name.rpartition(".")
    (fields[section] if section else fields)[field] = value
  spec = ModelSpec.from_config(fields)
  huggingface.warn_of_export(spec)  # At the start of a run.
  assert re.search(f"(?s)refuse this run.*{match}", caplog.text)
  # Checked before the parameters.
  model = ConvertedModel(spec, {"image": {}}, SQUASH)
  with pytest.raises(ConversionError, match=rf"(?s){match}"):
    huggingface.write(tmp_path / "a", model)
  assert not (tmp_path / "a").exists()


def _without_patches(params):
  image = {**params["image"], "extra": np.ones(3, np.float32)}
  del image["patch_embed"]
  return {**params, "image": image}


def _with_bias(params):
  head = {"logit_scale": np.float32(1), "logit_bias": np.float32(-10)}
  return {**params, "heads": {"contrastive": head}}


@pytest.mark.parametrize(
  ("kind", "change", "match"),
  [
    ("siglip", {"size": 96}, "preprocess.size.*--image_size"),
    (
      "siglip",
      _without_patches,
      "image/patch_embed/kernel: missing.*image/extra: not in the model",
    ),
    ("clip", _with_bias, "CLIPModel lacks the bias.*-10"),
  ],
)
def test_preprocessing_and_params_of_another_model(
  kind, change, match, tmp_path
):
  model = make_model(kind)
  if callable(change):
    odd = dataclasses.replace(model, params=change(model.params))
  else:
    odd = dataclasses.replace(model, preprocess={**SQUASH, **change})
  with pytest.raises(ConversionError, match=f"(?s){match}"):
    huggingface.write(tmp_path / "a", odd)
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
    ("radio", {"model_type": "swin"}, "There are: .*timm's folder, such as hf"),
    (
      "radio",
      {"model_type": "beit"},
      r"supported\. There are: .*timm's folder",
    ),
    ("siglip", {"model_type": "siglip2_text_model"}, "encodes no images; pass"),
    ("dinov3_vit", {"use_gated_mlp": True}, "hidden_act.*'silu'"),
    ("dinov3_vit", {"query_bias": False}, r"key_bias.*\(False, False, True\)"),
    ("dinov3_vit", {"mlp_bias": False}, "mlp_bias=False"),
    ("dinov3_vit", {"num_register_tokens": 3}, "register_tokens"),
    ("dinov3_vit", {"num_hidden_layers": 1}, "number of layers"),
    ("dinov3_vit", {"hidden_size": 128}, "sizes"),
    ("dinov3_vit", {"model_type": "dinov2"}, "embeddings.position_embeddings"),
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
    ({}, "lacks a config.json"),
    (
      {"model_type": "llava", "vision_config": {"model_type": "clip"}},
      "is a supported 'clip': save.*save_pretrained",
    ),
    (
      {"architecture": "eva02_base_patch16_clip_224"},
      r"EVA-CLIP.*Use eva02_\*\.mim_.*facebook/deit",
    ),
    *(
      ({"architecture": name, "model_args": {key: value}}, f"{key} is {value}")
      for name, key, value in (
        ("eva02_base_patch14_224", "rope_grid_offset", 1.0),
        ("eva02_base_patch14_224", "use_post_norm", True),
        ("eva02_base_patch14_224", "use_pre_transformer_norm", True),
        ("vit_pe_core_base_patch16_224", "attn_pool_num_heads", 4),
        ("vit_pe_core_base_patch16_224", "use_rot_pos_emb", False),
      )
    ),
    ({"architecture": "vit_base_patch16_rope_224"}, "is not supported"),
    ({"architecture": 3}, "architecture 3 is not supported"),
    ({"architecture": "vit_base_patch16_224"}, "patch_embed.*missing"),
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
  lines = (
    rf"(?s)missing \(1\):\s+{layer}.self_attn.k_proj.bias\s+unexpected \(1\):"
    r"\s+vision_model.extra\s+.*logit_scale: \(3,\) in the file, \(1,\) exp"
  )
  with pytest.raises(ConversionError, match=lines):
    huggingface.read(folder)


def test_other_kinds_of_weights(exports, tmp_path):
  folder = exports("siglip", tmp_path)
  weights = folder / "model.safetensors"
  whole = weights.read_bytes()
  weights.write_bytes(whole[:200])
  with pytest.raises(ConversionError, match="not a complete safetensors file"):
    huggingface.read(folder)
  weights.write_text("version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(ConversionError, match="run `git lfs pull` in"):
    huggingface.read(folder)
  weights.rename(folder / "flax_model.msgpack")
  with pytest.raises(ConversionError, match="Flax weights.*save_pretrained"):
    huggingface.read(folder)
  index = {"weight_map": {"logit_scale": "model-00001-of-00002.safetensors"}}
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps(index))
  with pytest.raises(ConversionError, match="00001-of-00002.*: download it"):
    huggingface.read(folder)
  with pytest.raises(FileNotFoundError, match="hub, as hf:ORG/NAME"):
    huggingface.read(folder / "google" / "siglip-base-patch16-224")


def test_a_tokenizer_of_merges_is_left_out(exports, tmp_path, caplog):
  folder = exports("clip", tmp_path)
  for name in ("vocab.json", "merges.txt"):
    (folder / name).write_text("{}")
  assert huggingface.read(folder).tokenizer is None
  assert "save its tokenizer once with transformers" in caplog.text


# ---------------------------------------------------------------------------
# Image processors.


def _square(side):
  return {"height": side, "width": side}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
  ("kind", "processor", "expected"),
  [
    ("siglip", {"size": _square(64), "resample": 2}, SQUASH),
    # As So400m/14 at 384: pixels that fill no patch are dropped.
    (
      "siglip",
      {"size": _square(70), "resample": 3},
      {"size": 64, "drop": 6, "interpolation": "bicubic"},
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
      "aimv2_vision_model",  # As AIMv2 native's: images of any size.
      {"size": {"shortest_edge": 72}, "do_resize": False}
      | {"do_center_crop": False, "resample": 3},
      {"size": 64, "resize": "squash", "crop": "none"},
    ),
    (
      "dinov3_vit",  # As on the Hub, with nulls.
      {
        **dict(crop_size=None, do_center_crop=None, do_resize=True),
        "image_mean": [0.485, 0.456, 0.4],
        "image_std": [0.229, 0.224, 0.2],
        "size": _square(96),
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
