"""Hostile exports, native folders and configs of runs."""

import os

import numpy as np
from hostile import foreign_samples as samples
from hostile.harness import Cases

HUGE = samples.HUGE
NAN = samples.NAN
EXPORTS = Cases(__file__, "exports, native folders")


def _described(keys, value, family="native"):
  def run(folder):
    path = samples.copy(family, folder)
    samples.change_json(path / "mtv_jax.json", keys, value)
    return samples.read(family, path)

  return run


for _keys, _label, _value in (
  ("format", "missing", ...),
  ("format", "another", 2),
  ("format", "a list", [1]),
  ("model", "missing", ...),
  ("model", "text", "x"),
  ("model.image", "missing", ...),
  ("model.image", "text", "x"),
  ("model.image.depth", "huge", HUGE),
  ("model.image.width", "negative", -32),
  ("model.image.width", "text", "x"),
  ("model.image.norm_eps", "nan", NAN),
  ("model.image.norm_eps", "zero", 0),
  ("model.image.pool", "unknown", "max"),
  ("model.image.pool", "a list", ["map"]),
  ("model.image.rope", "text", "x"),
  ("model.image.registers", "huge", HUGE),
  ("model.image.future", "unknown", 1),
  ("model.text.vocab_size", "huge", HUGE),
  ("model.text.length", "zero", 0),
  ("model.text", "a list", [1]),
  ("preprocess", "missing", ...),
  ("preprocess", "text", "x"),
  ("preprocess.size", "zero", 0),
  ("preprocess.size", "text", "x"),
  ("preprocess.std", "zero", [0, 0, 0]),
  ("preprocess.mean", "nan", [NAN] * 3),
  ("preprocess.mean", "text", "x"),
  ("preprocess.mean", "a number", 1),
  ("preprocess.mean", "two", [1, 2]),
  ("tokenizer", "text", "x"),
  ("tokenizer.clean", "missing", ...),
  ("tokenizer.clean", "unknown", "x"),
  ("tokenizer.file", "missing", "tokenizer.json"),
  ("tokenizer.built_in", "unknown", "x"),
  ("predictors", "text", "x"),
  ("predictors", "unknown", {"x": {}}),
  ("predictors", "a number", {"depth": 1}),
  ("predictors", "an unknown option", {"depth": {"x": 1}}),
  ("weights", "unknown", "best"),
  ("model.image.pool", "of a million characters", "x" * 1_000_000),
  ("tokenizer.clean", "of a million characters", "x" * 1_000_000),
):
  EXPORTS.add(
    f"{_keys} {_label}",
    _described(_keys, _value),
    match=_keys.rpartition(".")[2],
  )
for _label, _name in samples.OUTSIDE.items():
  if _name:
    _run = _described("tokenizer.file", _name)
    EXPORTS.add(f"tokenizer.file: {_label}", _run, match="mtv_jax.json")
for _keys, _label, _value in (
  ("contrastive", "text", "x"),
  ("contrastive.name", "missing", ...),
  ("contrastive.leaves", "text", "logit_scale"),
  ("model.image.depth", "of others", 2),
):
  _run = _described(_keys, _value, "export")
  EXPORTS.add(f"an export: {_keys} {_label}", _run, match="mtv_jax.json")
for _label, _data in samples.BROKEN.items():
  _run = samples.replacing("native", "mtv_jax.json", lambda _, d=_data: d)
  EXPORTS.add(f"mtv_jax.json {_label}", _run, match="mtv_jax.json")
for _label, _change in {
  "cut": lambda d: d[: len(d) // 2],
  "empty": lambda d: b"",
}.items():
  _run = samples.replacing("native", "params.safetensors", _change)
  EXPORTS.add(f"params {_label}", _run, match="params.safetensors")


def _params(change):
  def run(folder):
    path = samples.copy("native", folder)
    os.replace(path / "params.safetensors", path / "model.safetensors")
    tensors = samples.load_tensors(path)
    samples.save_tensors(path, change(tensors))
    os.replace(path / "model.safetensors", path / "params.safetensors")
    return samples.read("native", path)

  return run


for _label, _change in {
  "NaN": lambda t: t | {"image/norm/bias": np.full(32, NAN, np.float32)},
  "integers": lambda t: t | {"image/norm/bias": np.zeros(32, np.int32)},
  "another shape": lambda t: t | {"image/norm/bias": np.zeros(3, np.float32)},
  "more": lambda t: t | {"image/x": np.zeros(3, np.float32)},
  "none": lambda t: {},
}.items():
  EXPORTS.add(f"parameters: {_label}", _params(_change), match="image/")


@EXPORTS.add("a native folder that was not finished", match="did not finish")
def _unfinished(folder):
  path = samples.copy("native", folder)
  (path / "mtv_jax.json").unlink()
  return samples.read("native", path)


@EXPORTS.add("what a killed conversion left", match="unfinished")
def _temporary(folder):
  path = samples.copy("native", folder)
  name = ".out.01234567-12-01234567.0.tmp"
  return samples.read("native", path.rename(folder / name))


def _run_config(content):
  def run(folder):
    samples.write_json(folder / "config.json", content)
    return samples.read("run", folder)

  return run


for _label, _content in {
  "a key of a million characters": {"model": {"x" * 1_000_000: 1}},
  "model is text": {"model": "x"},
  "model is a list": {"model": [1]},
  "an unknown variant": {"model": {"variant": "Z/16"}},
  "a variant that is a number": {"model": {"variant": 3}},
  "an unknown key": {"model": {"variant": "mu/16", "x": 1}},
  "a vast depth": {"model": {"variant": "mu/16", "depth": HUGE}},
  "text that is no object": {"model": {"variant": "mu/16", "text": "x"}},
  "unknown weights": {"model": {"variant": "mu/16"}, "weights": ["x"]},
  "objectives that are text": {
    "model": {"variant": "mu/16"},
    "objectives": "x",
  },
  "data that is text": {"model": {"variant": "mu/16"}, "data": "x"},
  "no checkpoint": {"model": {"variant": "mu/16"}},
}.items():
  EXPORTS.add(f"a run: {_label}", _run_config(_content))


@EXPORTS.parametrize
def test_exports(case, hostile):
  hostile(case)
