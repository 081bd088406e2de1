"""Arguments of configs/continue_from.py: their effects and errors."""

import pytest
from hostile import foreign_samples as samples

from mtv_jax.config import recipes
from mtv_jax.data.registry import build_source
from mtv_jax.hooks.evaluation import EvaluationHook
from mtv_jax.train.run import open_run
from mtv_jax.utils.errors import ConfigError, MissingFileError


def build(folder, options=""):
  arguments = f"path={folder},data=scenes,batch=8,steps=20,dtype=float32"
  config = recipes.read_config(f"continue_from:{arguments}{options}")
  return open_run(config, folder / "run")


def read(options):
  folder = samples.base("siglip")
  return recipes.read_config(
    f"continue_from:path={folder},data=scenes{options}"
  )


def test_guards_have_their_values():
  config = read(",images_only,keep=scenes,features=3.0,gauge=photos,probe=x")
  tower = dict(layer_decay=0.85, start_percent=5.0)
  assert list(config.optim.rules) == [("^image/", tower)]
  assert config.schedule.warmup_percent == 2.0
  anchor, features = config.objectives.anchor, config.objectives.features
  assert (anchor.type, anchor.weight, anchor.teacher) == ("gram", 1.0, "start")
  assert (features.weight, tuple(features.sources)) == (3.0, (1,))
  assert config.teachers.start.path == config.init.path
  drift = config.evals.drift
  bound = dict(metric="neighbours", min=0.6, beyond_noise=True, then="return")
  assert drift.bound.to_dict() == bound
  assert config.evals.probe.data == "x" and config.evals.probe.bound.drop
  assert (drift.data, drift.reference) == ("photos", config.init.path)
  # Image and text towers; the checkpoint has the contrastive head.
  config = read("")
  rules = [
    (f"^{tower}/", dict(layer_decay=0.85)) for tower in ("image", "text")
  ]
  assert list(config.optim.rules) == rules
  config = read(",guards=False,images_only,probe=x")
  assert not config.optim.rules and not config.schedule.warmup_percent
  assert "teachers" not in config and "anchor" not in config.objectives
  assert not any(entry.get("bound") for entry in config.evals.values())


def test_canvases_have_the_pixels_of_crops():
  for options, canvas in (("", 32), (",images_only", 54)):
    config = recipes.read_config(f"continue_from:tiny{options}")
    assert config.model.preprocess["size"] == 32
    assert config.data.ops.startswith(f"decode|canvas({canvas})")
    assert config.data.train[0]["size"] == canvas


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ("guards=False,features=10", "guards=False and features=...: remove"),
    ("keep=scenes,guards=False", "guards=False and keep="),
    ("guards=False,layer_decay=0.85", "guards=False and layer_decay="),
    ("keep_share=0.25", "keep_share has no effect without keep=PATH"),
    ("keep=scenes,keep_share=0.0", "keep_share=0.0: expected"),
    ("keep=scenes,keep_share=1.0", "keep_share=1.0: expected"),
  ],
)
def test_arguments_that_contradict_each_other(options, message):
  with pytest.raises(ConfigError, match=message):
    recipes.read_config(f"continue_from:tiny,{options}")
  recipes.read_config("continue_from:tiny,guards=False,anchor=0,warmup=0.0")


def test_images_are_of_a_listing():
  config = recipes.read_config("continue_from:tiny,images=photos")
  with pytest.raises(ConfigError, match="'images'"):
    build_source(config.data.train[0])


def test_a_folder_without_tokenizer_or_data(tmp_path):
  folder = samples.copy("siglip", tmp_path)
  with pytest.raises(MissingFileError, match="lost") as caught:
    EvaluationHook().open(build(folder, f",gauge={tmp_path / 'lost'}"))
  assert caught.value.__notes__ == ["(in config.evals.drift)"]
  (folder / "tokenizer.json").unlink()
  with pytest.raises(ConfigError, match="siglip has no tokenizer that can be"):
    build(folder)
