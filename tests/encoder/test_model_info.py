"""Information on a folder's model: the loss of its image-text contrast."""

import json

import family_specs
import numpy as np
import pytest
import tower_parity as parity

from mtv_jax.config import recipes
from mtv_jax.convert import huggingface, native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder import loading
from mtv_jax.models.two_tower import ModelSpec

# By family: the scale of a checkpoint, the loss and the highest scale.
CASES = {
  "siglip": (117.0, "sigmoid", None),
  "clip": (100.0, "softmax", 100),
  "aimv2": (50.0, "softmax", 100),
  "tipsv2": (197.4, "softmax", 197.4),
}


def model_of(kind, scale, **head):
  spec = ModelSpec.from_config(family_specs.TEXT_SPECS[kind])
  params = parity.random_params(spec)
  head = {"logit_scale": np.log(scale), **head}
  params["heads"] = {"contrastive": {k: np.float32(v) for k, v in head.items()}}
  return ConvertedModel(spec, params, {"size": 64})


@pytest.mark.parametrize("kind", CASES)
def test_the_loss_is_the_checkpoints(kind, tmp_path):
  scale, loss_type, max_scale = CASES[kind]
  bias = -12.0 if kind == "siglip" else 0.0
  model = model_of(kind, scale, logit_bias=bias)
  folder = huggingface.write(tmp_path / "a", model)
  (folder / native.INFO).unlink()
  config = json.loads((folder / "config.json").read_text())
  assert config["model_type"] == kind
  # Also as `mtv-jax convert from_hf` writes it.
  back = huggingface.read(folder)
  for path in (folder, native.write(tmp_path / "b", back)):
    config = recipes.read_config(f"continue_from:path={path},data=scenes")
    entry = config.objectives.contrastive
    assert entry.loss_type == loss_type, path
    if max_scale is None:
      assert "max_scale" not in entry
      continue
    assert entry.max_scale == pytest.approx(max_scale, rel=1e-4), path
    # The first update clips nothing.
    start = back.params["heads"]["contrastive"]["logit_scale"]
    assert np.float32(np.log(entry.max_scale)) >= start


def test_the_loss_of_an_export_is_the_runs(tmp_path):
  """SigLIP's towers trained with a softmax loss, whose exports have no bias."""
  model = model_of("siglip", 120.0)
  for write, name in ((huggingface.write, "a"), (native.write, "b")):
    contrast = loading.read_model_info(write(tmp_path / name, model)).contrast
    assert contrast["loss_type"] == "softmax"
    assert contrast["max_scale"] == pytest.approx(120, rel=1e-4)


def test_a_folder_without_a_temperature_has_no_loss(tmp_path):
  model = model_of("siglip", 1.0)
  del model.params["heads"]
  folder = native.write(tmp_path / "a", model)
  assert loading.read_model_info(folder).contrast == {}
