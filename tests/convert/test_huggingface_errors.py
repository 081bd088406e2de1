"""Errors for folders and models that can't be converted."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtv_jax.convert import depth_anything, huggingface
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.convert.tables import ConversionError
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import two_tower as models
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

PREPROCESS = {"size": 64, "resize": "squash", "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def spec():
  text = {"variant": "mu", "depth": 1, "length": 16, "vocab_size": 258}
  return ModelSpec.from_config(
    {
      "variant": "mu/16",
      "image_size": 64,
      "mask_token": True,
      "text": text,
    }
  )


@pytest.fixture(scope="module")
def params(spec):
  abstract = dict(flatten_with_names(models.abstract_params(spec)))
  leaves = {n: np.zeros(a.shape, np.float32) for n, a in abstract.items()}
  for leaf in ("logit_scale", "logit_bias"):
    leaves[f"heads/contrastive/{leaf}"] = np.float32(1)
  return unflatten_names(leaves)


@pytest.fixture
def export(spec, params, tmp_path):
  tokenizer = TokenizerFiles(None, "lower")
  model = ConvertedModel(spec, params, PREPROCESS, tokenizer)
  return huggingface.write(tmp_path / "export", model)


@pytest.mark.parametrize(
  ("tower", "field", "value"),
  [
    ("image", "pool", "mean"),
    ("image", "registers", 2),
    ("image", "layer_scale", 0.1),
    ("image", "pre_norm", True),
    ("image", "patch_bias", False),
    ("text", "causal", True),
    ("text", "pool", "first"),
    ("text", "projection_bias", False),
  ],
)
def test_models_that_siglip_cannot_express(
  spec, params, tmp_path, tower, field, value
):
  part = dataclasses.replace(getattr(spec, tower), **{field: value})
  odd = dataclasses.replace(spec, **{tower: part})
  with pytest.raises(ConversionError, match=rf"{tower}\.{field} is {value!r}"):
    huggingface.write(tmp_path / "a", ConvertedModel(odd, params, PREPROCESS))
  assert not (tmp_path / "a").exists()


def test_an_image_tower_alone_is_compared_with_vision_models(
  spec, params, tmp_path
):
  """A CLIPModel has two towers, so its fields would be misleading."""
  image = dataclasses.replace(
    spec.image, pool="cls", cls_token=True, pre_norm=True
  )
  odd = ModelSpec(image=image)
  with pytest.raises(ConversionError, match=r"pre_norm is True") as error:
    huggingface.write(tmp_path / "a", ConvertedModel(odd, params, PREPROCESS))
  assert "Dinov2Model" in str(error.value)
  assert "CLIPModel" not in str(error.value)


@pytest.mark.parametrize(
  ("field", "value", "hint"),
  [("size", 96, "--image_size"), ("crop", "center", "squashed")],
)
def test_preprocessing_that_siglip_cannot_express(
  spec, params, tmp_path, field, value, hint
):
  preprocess = {**PREPROCESS, field: value}
  with pytest.raises(ConversionError, match=f"preprocess.{field}.*{hint}"):
    huggingface.write(tmp_path / "a", ConvertedModel(spec, params, preprocess))


BACKBONE = {
  "model_type": "dinov2",
  "hidden_size": 32,
  "num_attention_heads": 2,
  "num_hidden_layers": 4,
  "image_size": 28,
  "patch_size": 14,
  "out_indices": [1, 2, -2, 4],
}
DEPTH = {"backbone_config": BACKBONE, "reassemble_hidden_size": 32}


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("neck_hidden_sizes", 4),
    ("reassemble_factors", 3),
    ("patch_size", "a"),
    ("fusion_hidden_size", "x"),
    ("backbone_config", "x"),
    ("out_indices", 3),
    ("out_indices", ["a"] * 4),
    ("out_indices", [1, 2, 3, 9]),
    ("out_indices", [0, 1, 2, 3]),
    ("hidden_size", "x"),
    ("num_hidden_layers", "x"),
  ],
)
def test_depth_anything_configs_of_wrong_types(field, value):
  names = ["backbone.embeddings.cls_token"]
  assert depth_anything.read_spec(DEPTH, names).taps == (0, 1, 2, 3)
  change = {field: value}
  config = DEPTH | change
  if field in BACKBONE and field != "patch_size":
    config = DEPTH | {"backbone_config": BACKBONE | change}
  with pytest.raises(InputError, match=field):
    depth_anything.read_spec(config, names)


def test_params_of_another_model(spec, params, tmp_path):
  image = {**params["image"], "extra": np.ones(3, np.float32)}
  del image["patch_embed"]
  with pytest.raises(ConversionError) as error:
    huggingface.write(
      tmp_path / "a",
      ConvertedModel(spec, {**params, "image": image}, PREPROCESS),
    )
  assert "image/patch_embed/kernel: missing" in str(error.value)
  assert "image/extra: not in the model" in str(error.value)


def test_writing_replaces_only_an_earlier_export(
  spec, params, export, tmp_path
):
  (export / "notes.txt").write_text("mine")
  image = {k: v for k, v in params["image"].items() if k != "mask_token"}
  plain = dataclasses.replace(
    spec, image=dataclasses.replace(spec.image, mask_token=False)
  )
  huggingface.write(
    export, ConvertedModel(plain, {**params, "image": image}, PREPROCESS)
  )
  # Old heads or an old tokenizer would be read with the new weights.
  names = {p.name for p in export.iterdir()}
  assert not names & {"heads.safetensors", "tokenizer.json"}
  assert "notes.txt" in names
  other = tmp_path / "other"
  other.mkdir()
  (other / "thesis.tex").write_text("mine")
  with pytest.raises(ConversionError, match=r"not empty.*thesis\.tex"):
    huggingface.write(other, ConvertedModel(spec, params, PREPROCESS))


def _change(folder, change):
  """Rewrites an export as a plain Hugging Face folder with other tensors."""
  (folder / "mtv_jax.json").unlink()
  file = str(folder / "model.safetensors")
  tensors = load_file(file)
  change(tensors)
  save_file(tensors, file)


def test_each_wrong_tensor_is_named(export):
  layer = "vision_model.encoder.layers.1"

  def change(tensors):
    del tensors[f"{layer}.self_attn.k_proj.bias"]
    tensors["vision_model.extra"] = np.ones(2, np.float32)
    tensors["logit_scale"] = np.ones(3, np.float32)

  _change(export, change)
  with pytest.raises(ConversionError) as error:
    huggingface.read(export)
  text = str(error.value)
  assert "missing (1)" in text
  assert f"{layer}.self_attn.k_proj.bias" in text
  assert "vision_model.extra" in text
  assert "logit_scale: (3,) in the file, (1,) expected" in text


@pytest.mark.parametrize(
  ("field", "value", "cause"),
  [
    ("image_size", 96, "image_size"),
    ("num_hidden_layers", 3, "number of layers"),
    ("intermediate_size", 128, "sizes"),
  ],
)
def test_a_config_of_another_model(export, field, value, cause):
  (export / "mtv_jax.json").unlink()
  path = export / "config.json"
  config = json.loads(path.read_text())
  config["vision_config"][field] = value
  path.write_text(json.dumps(config))
  with pytest.raises(ConversionError, match=cause):
    huggingface.read(export)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"model_type": "siglip2_text_model"}, "text tower alone"),
    ({"model_type": "siglp"}, "Did you mean 'siglip'"),
    ({"model": {}}, "training run"),
    ({}, "no config.json"),
  ],
)
def test_other_kinds_of_folders(config, message, tmp_path):
  if config:
    (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ConversionError, match=message):
    huggingface.read(tmp_path)


def test_other_kinds_of_weights(export):
  weights = export / "model.safetensors"
  whole = weights.read_bytes()
  weights.write_bytes(whole[:200])
  with pytest.raises(ConversionError, match="not a whole safetensors file"):
    huggingface.read(export)
  weights.write_text("version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(ConversionError, match="git lfs pull"):
    huggingface.read(export)
  weights.rename(export / "pytorch_model.bin")
  with pytest.raises(ConversionError, match="pickles.*save_pretrained"):
    huggingface.read(export)
  index = {"weight_map": {"logit_scale": "model-00001-of-00002.safetensors"}}
  path = export / "model.safetensors.index.json"
  path.write_text(json.dumps(index))
  with pytest.raises(ConversionError, match=r"00001-of-00002.*is missing"):
    huggingface.read(export)
  with pytest.raises(FileNotFoundError, match="hub, as hf:ORG/NAME"):
    huggingface.read(export / "google" / "siglip-base-patch16-224")


# ---------------------------------------------------------------------------
# Image processors of other folders.


@pytest.mark.parametrize(
  ("processor", "expected"),
  [
    (
      {"size": {"height": 64, "width": 64}, "resample": 2},
      {"size": 64, "resize": "squash", "interpolation": "bilinear"},
    ),
    # As So400m/14 at 384: pixels that fill no patch are dropped.
    (
      {"size": {"height": 70, "width": 70}, "resample": 3},
      {"size": 64, "interpolation": "bicubic"},
    ),
    (
      {"size": 64, "do_rescale": False, "do_normalize": False},
      {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3},
    ),
    (
      {"size": {"shortest_edge": 72}, "do_center_crop": True, "crop_size": 64},
      {"size": 64, "resize": "shortest", "crop": "center", "resize_size": 72},
    ),
  ],
)
@pytest.mark.parametrize("version", [4, 5])
def test_processors(export, processor, expected, version):
  (export / "mtv_jax.json").unlink()
  (export / "preprocessor_config.json").unlink()
  if version == 4:
    file, content = "preprocessor_config.json", processor
  else:
    file, content = "processor_config.json", {"image_processor": processor}
  (export / file).write_text(json.dumps(content))
  fields = huggingface.read(export).preprocess
  assert {k: fields[k] for k in expected} == expected
  Preprocess.from_dict(fields)


def test_an_unsupported_processor(export):
  (export / "mtv_jax.json").unlink()
  path = export / "preprocessor_config.json"
  path.write_text(json.dumps({"resample": 1}))
  with pytest.raises(ConversionError, match=r"preprocessor_config.*resample=1"):
    huggingface.read(export)
