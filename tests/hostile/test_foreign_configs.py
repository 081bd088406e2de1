"""Hostile configs of models: Hugging Face's, processors, exports and runs."""

import os

import numpy as np
from hostile import foreign_samples as samples
from hostile.foreign_samples import HUGE, NAN
from hostile.harness import Cases, run_all
from hostile.samples import BROKEN_BYTES, BROKEN_JSON, OUTSIDE, by_repr, changed

CONFIGS = Cases(__file__, "configs of Hugging Face", every=12)
PROCESSORS = Cases(__file__, "image processors", every=5)
EXPORTS = Cases(__file__, "exports, native folders", every=6)
LONG = "x" * 1_000_000


def _read_changed(family, name):
  """Reads a folder whose file `name` has another value at some keys."""

  def read(folder, change):
    path = samples.copy(family, folder)
    samples.change_json(path / name, *change)
    return samples.read(family, path)

  return read


def _add(cases, family, name, values, **options):
  """Cases of values at dotted keys, which the message must name."""
  for keys, listed in values.items():
    for label, value in by_repr(listed).items():
      case = {f"{family}: {keys} is {label}": (keys, value)}
      named = {"match": keys.rpartition(".")[2]} | options
      cases.add_table(_read_changed(family, name), case, **named)


def _list_keys(content, prefix=""):
  """Dotted keys of all values of nested objects."""
  for key, value in content.items():
    yield prefix + key
    if isinstance(value, dict):
      yield from _list_keys(value, f"{prefix}{key}.")


WRONG = [*samples.WRONG.values()]
_VALUES = {
  "siglip": {
    "vision_config.hidden_size": WRONG,
    "text_config.vocab_size": WRONG,
    "vision_config": ["x", []],
    "vision_config.layer_norm_eps": [NAN, "1e-6", 0],
    "vision_config.hidden_act": ["swish", 1],
    "vision_config.num_channels": [4],
    "vision_config.vision_use_head": ["yes"],
    "vision_config.image_size": [[32, 48]],
    "text_config.max_position_embeddings": [HUGE],
    "text_config.projection_size": ["x"],
    "model_type": [["siglip"], {}, "siglop"],
  },
  "clip": {
    "vision_config.patch_size": WRONG,
    "text_config.num_hidden_layers": WRONG,
    "text_config.eos_token_id": ["x", []],
    "text_config.hidden_size": [32.5],
    "projection_dim": [[32]],
  },
  "dinov2": {
    "num_hidden_layers": WRONG,
    "image_size": WRONG,
    "mlp_ratio": [NAN, 1e30, -4],
    "layerscale_value": ["x"],
    "qkv_bias": [False],
    "use_swiglu_ffn": ["x"],
  },
  "dinov3": {
    "num_hidden_layers": WRONG,
    "intermediate_size": WRONG,
    "rope_theta": [NAN],
    "pos_embed_jitter": ["x"],
    "query_bias": [False],
    "use_gated_mlp": [2],
  },
  "siglip2": {"num_patches": [*WRONG, 5], "patch_size": WRONG},
  "aimv2": {
    "intermediate_size": WRONG,
    "image_size": WRONG,
    "rms_norm_eps": [NAN],
    "qkv_bias": [True],
    "hidden_act": ["gelu"],
  },
  "radio": {
    "max_img_size": WRONG,
    "num_cls_tokens": WRONG,
    "norm_std": [[0, 1, 1]],
    "norm_mean": ["x"],
    "video_temporal_patch_size": [2],
  },
  "tipsv2": {
    "num_hidden_layers": WRONG,
    "num_attention_heads": WRONG,
    "qkv_bias": [False],
    "hidden_act": ["swish"],
  },
  "depth_anything": {
    "backbone_config.hidden_size": WRONG,
    "fusion_hidden_size": WRONG,
    "neck_hidden_sizes": [4, [], [HUGE] * 4],
    "reassemble_factors": [[NAN] * 4, "4,2,1"],
    "max_depth": [NAN],
    "depth_estimation_type": ["metric"],
    "backbone_config.out_indices": [["a"] * 4, [HUGE] * 4],
    "backbone_config.layer_norm_eps": [NAN],
    "backbone_config.model_type": ["beit"],
  },
  "owlv2": {
    "vision_config.num_attention_heads": WRONG,
    "projection_dim": WRONG,
    "text_config": ["x"],
    "vision_config.image_size": [[-32, -32]],
  },
}
for _family, _values in _VALUES.items():
  _add(CONFIGS, _family, "config.json", _values)
for _family, _keys, _value, _match in (
  ("siglip", "vision_config.image_size", 8, "patch_size"),
  ("siglip", "vision_config.num_attention_heads", 3, "divi"),
  ("siglip", "vision_config.num_hidden_layers", 2, "layers"),
  ("siglip", "model_type", ..., "model_type"),
  ("depth_anything", "model_type", "siglip", "model_type"),
  # transformers has defaults for null or missing keys; these fit no tensor.
  *(
    (family, "vision_config.hidden_size", value, "768")
    for family in ("siglip", "clip", "owlv2")
    for value in (..., None)
  ),
):
  _add(CONFIGS, _family, "config.json", {_keys: [_value]}, match=_match)
_odd = {"unknown_key": [HUGE], "torch_dtype": [["x"]]}
_add(CONFIGS, "siglip", "config.json", _odd, match="", expects="used")
# Every key of every family.
for _family, _config in samples.CONFIGS.items():
  _values = {keys: [{"b": 1}, LONG[:999]] for keys in _list_keys(_config)}
  _add(CONFIGS, _family, "config.json", _values, match="", expects="error used")


def _replace(family, name):
  """Reads a folder with different bytes in the file `name`."""

  def read(folder, content):
    path = samples.copy(family, folder)
    (path / name).write_bytes(content)
    return samples.read(family, path)

  return read


for _cases, _family, _name in (
  (CONFIGS, "siglip", "config.json"),
  (PROCESSORS, "clip", "preprocessor_config.json"),
  (EXPORTS, "native", "mtv_jax.json"),
):
  _read = _replace(_family, _name)
  _cases.add_table(_read, BROKEN_JSON, prefix=f"{_name} ", match=_name)


@CONFIGS.add("config.json of 100 MB", match="config.json")
def _large_config(folder):
  path = samples.copy("siglip", folder)
  with (path / "config.json").open("ab") as file:
    file.truncate(100 << 20)
  return samples.read("siglip", path)


@CONFIGS.add("config.json is a folder", match="config.json")
def _folder_config(folder):
  path = samples.copy("siglip", folder)
  (path / "config.json").unlink()
  (path / "config.json").mkdir()
  return samples.read("siglip", path)


# --- Processors --------------------------------------------------------------


def _read_processor(folder, content):
  family, name, content = content
  path = samples.copy(family, folder)
  samples.write_json(path / name, content)
  return samples.read(family, path)


def _add_processors(family, name, values):
  contents = {
    f"{family}: {label}": (family, name, content)
    for label, content in changed({}, values).items()
  }
  PROCESSORS.add_table(_read_processor, contents, match=name)


_PREPROCESSOR = "preprocessor_config.json"
_add_processors(
  "clip",
  _PREPROCESSOR,
  {
    "size": [
      *["x", 0, HUGE, {"height": 32}, {"shortest_edge": HUGE}],
      *[{"shortest_edge": "x"}, {"shortest_edge": 0}],
      {"height": -32, "width": -32},
      {"height": "a", "width": "b"},
      {"height": 32, "width": 64},
      {"shortest_edge": 32, "longest_edge": 64},
    ],
    "resample": ["bicubic", 7, [3]],
    "image_mean": ["x", 0.5, [0.5], [NAN] * 3],
    "image_std": [[0] * 3, [-1] * 3, [NAN] * 3],
    "rescale_factor": [0, "x", NAN],
    "do_resize": ["no"],
    "do_center_crop": [2],
    "do_normalize": [[1]],
  },
)
PROCESSORS.add_table(
  _read_processor,
  {
    label: ("clip", _PREPROCESSOR, content)
    for label, content in changed(
      {"size": 32}, {"crop_size": ["x", 64, 8]}
    ).items()
  },
  match=_PREPROCESSOR,
)
_version_5 = {"image_processor": ["x", [1], {"image_std": "x"}]}
_add_processors("clip", "processor_config.json", _version_5)
_channels = {"image_mean": ["x", [0, 0]], "image_std": [[0, 0, 0]]}
_add_processors("owlv2", _PREPROCESSOR, _channels)


# --- Exports -----------------------------------------------------------------

_add(
  EXPORTS,
  "native",
  "mtv_jax.json",
  {
    "format": [..., 2, [1]],
    "model": [..., "x"],
    "model.image": [..., "x"],
    "model.image.depth": [HUGE],
    "model.image.width": [-32, "x"],
    "model.image.norm_eps": [NAN, 0],
    "model.image.pool": ["max", ["map"], LONG],
    "model.image.rope": ["x"],
    "model.image.registers": [HUGE],
    "model.image.future": [1],
    "model.text.vocab_size": [HUGE],
    "model.text.length": [0],
    "model.text": [[1]],
    "preprocess": [..., "x"],
    "preprocess.size": [0, "x"],
    "preprocess.std": [[0, 0, 0]],
    "preprocess.mean": [[NAN] * 3, "x", 1, [1, 2]],
    "tokenizer": ["x"],
    "tokenizer.clean": [..., "x", LONG],
    "tokenizer.built_in": ["x"],
    "predictors": ["x", {"depth": 1}],
    "weights": ["best"],
  },
)
_heads = {"predictors": [{"x": {}}, {"depth": {"x": 1}}]}
_add(EXPORTS, "native", "mtv_jax.json", _heads, match="heads' description")
for _family, _values in {
  "native": {
    "tokenizer.file": ["tokenizer.json", *filter(None, OUTSIDE.values())]
  },
  "export": {
    "contrastive": ["x"],
    "contrastive.name": [...],
    "contrastive.leaves": ["logit_scale"],
    "model.image.depth": [2],
  },
}.items():
  _add(EXPORTS, _family, "mtv_jax.json", _values, match="mtv_jax.json")
EXPORTS.add_table(
  _replace("native", "params.safetensors"),
  {name: change(bytes(5000)) for name, change in BROKEN_BYTES.items()},
  prefix="params ",
  match="params.safetensors",
)


def _read_params(folder, change):
  path = samples.copy("native", folder)
  os.replace(path / "params.safetensors", path / "model.safetensors")
  samples.save_tensors(path, change(samples.load_tensors(path)))
  os.replace(path / "model.safetensors", path / "params.safetensors")
  return samples.read("native", path)


def _set_bias(value):
  return lambda tensors: tensors | {"image/norm/bias": value}


EXPORTS.add_table(
  _read_params,
  {
    "NaN": _set_bias(np.full(32, NAN, np.float32)),
    "integers": _set_bias(np.zeros(32, np.int32)),
    "another shape": _set_bias(np.zeros(3, np.float32)),
    "more": lambda t: t | {"image/x": np.zeros(3, np.float32)},
    "none": lambda t: {},
  },
  prefix="parameters: ",
  match="image/",
)


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


def _read_run(folder, content):
  samples.write_json(folder / "config.json", content)
  return samples.read("run", folder)


_VARIANT = {"variant": "mu/16"}
EXPORTS.add_table(
  _read_run,
  {
    "a key of a million characters": {"model": {LONG: 1}},
    "model is text": {"model": "x"},
    "model is a list": {"model": [1]},
    "an unknown variant": {"model": {"variant": "Z/16"}},
    "a variant that is a number": {"model": {"variant": 3}},
    "an unknown key": {"model": _VARIANT | {"x": 1}},
    "a vast depth": {"model": _VARIANT | {"depth": HUGE}},
    "text that is no object": {"model": _VARIANT | {"text": "x"}},
    "unknown weights": {"model": _VARIANT, "weights": ["x"]},
    "objectives that are text": {"model": _VARIANT, "objectives": "x"},
    "data that is text": {"model": _VARIANT, "data": "x"},
    "no checkpoint": {"model": _VARIANT},
  },
  prefix="a run: ",
)

test_configs = run_all(CONFIGS, PROCESSORS, EXPORTS)
