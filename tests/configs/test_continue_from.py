"""Inputs of configs/continue_from.py that can't be used, and their errors."""

import pytest
from hostile import foreign_samples as samples

from mtv_jax.config import schema
from mtv_jax.train.experiment import build_experiment
from mtv_jax.utils.errors import ConfigError, MissingFileError


def build(folder, options=""):
  arguments = f"path={folder},data=scenes,batch=8,steps=20,dtype=float32"
  config = schema.read_config(f"continue_from:{arguments}{options}")
  return build_experiment(config, folder / "run")


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
def test_a_share_of_kept_images_that_is_none(share):
  with pytest.raises(ConfigError, match=f"keep_share={share}: expected"):
    schema.read_config(f"continue_from:tiny,keep=scenes,keep_share={share}")


def test_a_folder_without_tokenizer(tmp_path):
  folder = samples.copy("siglip", tmp_path)
  (folder / "tokenizer.json").unlink()
  with pytest.raises(ConfigError, match="siglip has no tokenizer that can be"):
    build(folder)


def test_the_evaluation_whose_data_are_missing_is_named(tmp_path):
  folder = samples.copy("siglip", tmp_path)
  with pytest.raises(MissingFileError, match="lost") as caught:
    build(folder, f",gauge={tmp_path / 'lost'}")
  assert caught.value.__notes__ == ["(in config.evals.drift)"]
