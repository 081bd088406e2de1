"""load: runs, native folders, Hugging Face folders, and unknown folders."""

import json
import logging
import subprocess
import sys

import jax
import numpy as np
import pytest
from hostile import foreign_samples as samples
from random_trees import random_params

import mtv_jax
from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.convert import huggingface, native, tensors
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.encoder import loading
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import two_tower as models

TOWER = {"width": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
MODEL = {
  "image_size": 32,
  "patch_size": 8,
  "pool": "map",
  **TOWER,
  "text": dict(
    length=12, vocab_size=258, tokenizer="bytes", clean="lower", **TOWER
  ),
}
SPEC = models.ModelSpec.from_config(MODEL)


def init(seed):
  scalars = {"logit_scale": 1.0, "logit_bias": -3.0}
  head = {name: np.array(x, "f4") for name, x in scalars.items()}
  return random_params(SPEC, seed=seed) | {"heads": {"contrastive": head}}


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (40, 30 + i, 3), np.uint8) for i in range(3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run's folder, with different weights in each part and two steps."""
  folder = tmp_path_factory.mktemp("run")
  config = {"model": MODEL, "views": {"image": {"ops": "resize(32)"}}}
  (folder / "config.json").write_text(json.dumps(config))
  with Checkpointer(folder / "checkpoints", every_steps=1, keep=5) as saver:
    for step in (1, 2):
      teacher = {"image": init(20 + step)["image"]}
      state = {"params": init(step), "teacher": teacher, "ema": init(10 + step)}
      saver.save(step, state)
  return folder


def same(got, want):
  leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return all(np.array_equal(a, b) for a, b in leaves)


def test_a_run_by_weights_and_step(run, images):
  encoder = mtv_jax.load(run)
  assert same(encoder.params, init(2))
  assert encoder.preprocess == Preprocess(size=32)
  assert encoder.image(images).pooled.shape == (3, 32)
  text = encoder.text(["a", "b"])
  assert encoder.similarity(np.ones((3, 32)), text).shape == (3, 2)
  assert encoder.protocol()["weights"] == "student"
  assert same(loading.read_params(run, step=1), init(1))
  assert same(loading.read_params(run, weights="ema"), init(12))
  teacher = loading.read_params(run, weights="teacher")
  assert same(teacher["image"], init(22)["image"])
  assert same(teacher["text"], init(2)["text"])


def test_positions_follow_the_new_model(run):
  larger = models.ModelSpec.from_config({**MODEL, "image_size": 48})
  params = loading.read_params(run, spec=larger)
  assert params["image"]["position_embedding"].shape == (36, 32)


def test_differences_that_no_shape_shows_are_logged(run, caplog):
  caplog.set_level(logging.WARNING)
  same = models.ModelSpec.from_config(MODEL)
  loading.read_params(run, spec=same, pixels=((0.5,) * 3, (0.5,) * 3))
  assert not caplog.messages
  other = models.ModelSpec.from_config({**MODEL, "gelu": "exact"})
  loading.read_params(run, spec=other, pixels=((0.5,) * 3, (1.0,) * 3))
  (message,) = caplog.messages
  assert "image.gelu=tanh, but this run has exact; image_std=(0.5, 0" in message


def test_a_native_folder(tmp_path, images, run):
  encoder = mtv_jax.load(run)
  model = ConvertedModel(
    SPEC,
    init(2),
    encoder.preprocess.to_dict(),
    TokenizerFiles(None, "lower"),
    weights="teacher",
  )
  native.write(tmp_path / "native", model)
  again = mtv_jax.load(tmp_path / "native")
  assert again.weights == "teacher"
  np.testing.assert_array_equal(
    again.image(images).patches, encoder.image(images).patches
  )
  np.testing.assert_array_equal(again.text(["A b"]), encoder.text(["a B"]))
  with pytest.raises(ValueError, match="one set of weights.*'ema'"):
    mtv_jax.load(tmp_path / "native", weights="ema")


def link_run(run, folder, **model):
  """A folder with the run's checkpoints and another model's config."""
  (folder / "config.json").write_text(json.dumps({"model": MODEL | model}))
  (folder / "checkpoints").symlink_to(run / "checkpoints")


MOVED = MODEL["text"] | {"tokenizer": "old/place/my.model"}


@pytest.mark.parametrize(
  ("path", "options", "files", "error", "message"),
  [
    ("/no", {}, {}, FileNotFoundError, "does not exist.*Expected a"),
    ("google/x", {}, {}, FileNotFoundError, r"not a local path; .*\[hub\]"),
    ("RUN/checkpoints", {}, {}, FileNotFoundError, "run's folder, RUN;"),
    ("RUN/checkpoints/7", {}, {}, FileNotFoundError, "run's folder, RUN;"),
    ("", {}, {"notes": "x"}, FileNotFoundError, r"has notes\. Expected"),
    ("", {}, {"a.pth": "x"}, FileNotFoundError, r'beside it.*"architecture"'),
    (
      "",
      {},
      {"config.json": '{"a": 1}', "n": ""},
      FileNotFoundError,
      r"config\.json, n",
    ),
    ("", {}, {"config.json": "{"}, ValueError, "not JSON"),
    ("RUN", {"weights": "teachers"}, {}, ValueError, "mean 'teacher'"),
    ("RUN", {"step": 7}, {}, FileNotFoundError, "7"),
    (
      "",
      {},
      {"width": 64},
      ValueError,
      r"config\.json describes a different model.*\.old(.|\n)*image/.*32.*64",
    ),
    ("", {}, {"text": MOVED}, FileNotFoundError, r"tokenizer/my\.model.*old/"),
  ],
)
def test_folders_that_can_not_be_loaded(
  path, options, files, error, message, run, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  if {"width", "text"} & files.keys():
    link_run(run, tmp_path, **files)
  else:
    for name, content in files.items():
      (tmp_path / name).write_text(content)
  message = message.replace("RUN", str(run))
  path = path.replace("RUN", str(run)) or tmp_path
  with pytest.raises(error, match=message):
    mtv_jax.load(path, **options)


def test_the_package_imports_nothing_heavy(repo_root):
  code = (
    "import sys, mtv_jax; mtv_jax.__version__; dir(mtv_jax)\n"
    "heavy = {'jax', 'flax', 'numpy', 'PIL'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
    "assert mtv_jax.load.__name__ == 'load'"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=repo_root)
  with pytest.raises(AttributeError, match="no attribute 'loads'"):
    mtv_jax.loads  # noqa: B018


@pytest.mark.parametrize("family", ["siglip", "depth_anything", "export"])
def test_a_model_without_its_parameters(family, monkeypatch):
  folder = samples.base(family)
  want = huggingface.read(folder)
  monkeypatch.setattr(tensors, "load", None)
  got = huggingface.read(folder, with_params=False)
  assert got.spec == want.spec and got.preprocess == want.preprocess
  assert got.prediction_heads == want.prediction_heads and got.params == {}
