"""Hostile configs of models: Hugging Face's, processors, exports and runs."""

import os

import numpy as np
from hostile import foreign_samples as samples
from hostile.foreign_samples import HUGE, NAN
from hostile.harness import Cases, run_all
from hostile.samples import (
  BROKEN_BYTES,
  BROKEN_JSON,
  OUTSIDE,
  PLACES,
  by_repr,
  changed,
)

CONFIGS = Cases(__file__, "configs of Hugging Face")
PROCESSORS = Cases(__file__, "image processors")
EXPORTS = Cases(__file__, "exports, native folders")
LONG = "x" * 1_000_000


def _add(cases, family, name, values, **options):
  """Cases of values at dotted keys, which the message must name."""
  read = samples.read_edited(
    family, lambda path, change: samples.change_json(path / name, *change)
  )
  for keys, listed in values.items():
    for label, value in by_repr(listed).items():
      case = {f"{family}: {keys} is {label}": (keys, value)}
      named = {"match": keys.rpartition(".")[2]} | options
      cases.add_table(read, case, **named)


def _list_values(content, prefix=""):
  """Dotted keys and values of nested objects."""
  for key, value in content.items():
    yield prefix + key, value
    if isinstance(value, dict):
      yield from _list_values(value, f"{prefix}{key}.")


# Valid in type, or special to a family.
_VALUES = {
  "siglip": {
    "vision_config": ["x", []],
    "vision_config.layer_norm_eps": [NAN, "1e-6", 0],
    "vision_config.hidden_act": ["swish", 1],
    "vision_config.num_channels": [4],
    "vision_config.vision_use_head": ["yes"],
    "vision_config.image_size": [[32, 48]],
    "model_type": [["siglip"], {}, "siglop"],
  },
  "clip": {
    "text_config.eos_token_id": ["x", []],
    "text_config.hidden_size": [32.5],
    "projection_dim": [[32]],
  },
  "dinov2": {
    "mlp_ratio": [1e30, -4],
    "layerscale_value": ["x"],
    "qkv_bias": [False],
    "use_swiglu_ffn": ["x"],
  },
  "dinov3": {
    "rope_theta": [NAN],
    "pos_embed_jitter": ["x"],
    "query_bias": [False],
    "use_gated_mlp": [2],
  },
  "siglip2": {"num_patches": [5]},
  "aimv2": {"rms_norm_eps": [NAN], "qkv_bias": [True], "hidden_act": ["gelu"]},
  "radio": {
    "norm_std": [[0, 1, 1]],
    "norm_mean": ["x"],
    "num_cls_tokens": [*samples.WRONG.values()],
    "video_temporal_patch_size": [2],
  },
  "tipsv2": {"qkv_bias": [False], "hidden_act": ["swish"]},
  "depth_anything": {
    "neck_hidden_sizes": [4, [], [HUGE] * 4],
    "reassemble_factors": [[NAN] * 4, "4,2,1"],
    "max_depth": [NAN],
    "depth_estimation_type": ["metric"],
    "backbone_config.out_indices": [["a"] * 4, [HUGE] * 4],
    "backbone_config.layer_norm_eps": [NAN],
    "backbone_config.model_type": ["beit"],
  },
  "owlv2": {"text_config": ["x"], "vision_config.image_size": [[-32, -32]]},
}
_LENIENT = ("eos_token_id", "num_register_tokens")
for _family, _config in samples.CONFIGS.items():
  _keys = dict(_list_values(_config))
  _numbers = [
    keys
    for keys, value in _keys.items()
    if type(value) is int and not keys.endswith(_LENIENT)
  ]
  _wrong = {keys: samples.WRONG.values() for keys in _numbers}
  _add(CONFIGS, _family, "config.json", _wrong)
  _add(CONFIGS, _family, "config.json", _VALUES.get(_family, {}))
  _others = [keys for keys in _keys if keys not in _numbers]
  _odd = {keys: [{"b": 1}, LONG[:999]] for keys in _others}
  _add(CONFIGS, _family, "config.json", _odd, match="", expects="error used")
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


def _replace(family, name):
  """Reads a folder with different content in the file `name`."""
  return samples.read_edited(
    family, lambda path, content: samples.write(path, name, content)
  )


for _cases, _family, _name in (
  (CONFIGS, "siglip", "config.json"),
  (PROCESSORS, "clip", "preprocessor_config.json"),
  (EXPORTS, "native", "mtv_jax.json"),
):
  _read = _replace(_family, _name)
  _cases.add_table(_read, BROKEN_JSON, prefix=f"{_name} ", match=_name)


def _replace_place(path, make):
  (path / "config.json").unlink()
  make(path / "config.json")


_read = samples.read_edited("siglip", _replace_place)
CONFIGS.add_table(_read, PLACES, prefix="config.json is ", match="config.json")


# --- Processors --------------------------------------------------------------


_PREPROCESSOR = "preprocessor_config.json"
_sizes = ["x", 0, HUGE, {"height": 32}, {"shortest_edge": HUGE}]
_sizes += [{"shortest_edge": "x"}, {"shortest_edge": 0}]
_sizes += [{"height": -32, "width": -32}, {"height": "a", "width": "b"}]
_sizes += [{"height": 32, "width": 64}]
_sizes += [{"shortest_edge": 32, "longest_edge": 64}]
_values = {
  "size": _sizes,
  "resample": ["bicubic", 7, [3]],
  "image_mean": ["x", 0.5, [0.5], [NAN] * 3],
  "image_std": [[0] * 3, [-1] * 3, [NAN] * 3],
  "rescale_factor": [0, "x", NAN],
  "do_resize": ["no"],
  "do_center_crop": [2],
  "do_normalize": [[1]],
}
_channels = {"image_mean": ["x", [0, 0]], "image_std": [[0, 0, 0]]}
_version_5 = {"image_processor": ["x", [1], {"image_std": "x"}]}
for _family, _name, _contents in (
  ("clip", _PREPROCESSOR, changed({}, _values)),
  ("clip", _PREPROCESSOR, changed({"size": 32}, {"crop_size": ["x", 64, 8]})),
  ("clip", "processor_config.json", changed({}, _version_5)),
  ("owlv2", _PREPROCESSOR, changed({}, _channels)),
):
  _options = {"prefix": f"{_family}: ", "match": _name}
  PROCESSORS.add_table(_replace(_family, _name), _contents, **_options)


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


def _change_params(path, change):
  os.replace(path / "params.safetensors", path / "model.safetensors")
  samples.save_tensors(path, change(samples.load_tensors(path)))
  os.replace(path / "model.safetensors", path / "params.safetensors")


def _set_bias(value):
  return lambda tensors: tensors | {"image/norm/bias": value}


EXPORTS.add_table(
  samples.read_edited("native", _change_params),
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


_read = samples.read_edited("native", lambda path, name: (path / name).unlink())
_unfinished = {"not finished": "mtv_jax.json"}
EXPORTS.add_table(_read, _unfinished, match="did not finish")


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
