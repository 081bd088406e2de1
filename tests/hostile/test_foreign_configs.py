"""Hostile configs and image processors of Hugging Face folders."""

from hostile import foreign_samples as samples
from hostile.harness import Cases

HUGE = samples.HUGE
NAN = samples.NAN
CONFIGS = Cases(__file__, "configs of Hugging Face")
PROCESSORS = Cases(__file__, "image processors")


def _config(family, keys, value, match=None):
  """A folder whose config.json has another value; the error names the key."""

  def run(folder):
    path = samples.copy(family, folder)
    samples.change_json(path / "config.json", keys, value)
    return samples.read(family, path)

  last = keys.rpartition(".")[2]
  return run, last if match is None else match


def _add_config(family, keys, label, value, *, expects="error", match=None):
  run, match = _config(family, keys, value, match)
  CONFIGS.add(f"{family}: {keys} {label}", run, expects=expects, match=match)


_SIZES = {
  "siglip": ("vision_config.hidden_size", "text_config.vocab_size"),
  "clip": ("vision_config.patch_size", "text_config.num_hidden_layers"),
  "dinov2": ("num_hidden_layers", "image_size"),
  "dinov3": ("num_hidden_layers", "intermediate_size"),
  "siglip2": ("num_patches", "patch_size"),
  "aimv2": ("intermediate_size", "image_size"),
  "radio": ("max_img_size", "num_cls_tokens"),
  "tipsv2": ("num_hidden_layers", "num_attention_heads"),
  "depth_anything": ("backbone_config.hidden_size", "fusion_hidden_size"),
  "owlv2": ("vision_config.num_attention_heads", "projection_dim"),
}
for _family, _keys in _SIZES.items():
  for _key in _keys:
    for _label, _value in samples.WRONG.items():
      # A size as a list is one of square images.
      _add_config(_family, _key, _label, _value)
for _family, _keys, _label, _value in (
  ("siglip", "vision_config", "text", "x"),
  ("siglip", "vision_config", "a list", []),
  ("siglip", "vision_config.layer_norm_eps", "zero", 0),
  ("siglip", "vision_config.layer_norm_eps", "nan", NAN),
  ("siglip", "vision_config.layer_norm_eps", "text", "1e-6"),
  ("siglip", "vision_config.hidden_act", "unknown", "swish"),
  ("siglip", "vision_config.hidden_act", "a number", 1),
  ("siglip", "vision_config.hidden_act", "a list", ["gelu"]),
  ("siglip", "vision_config.num_channels", "four", 4),
  ("siglip", "vision_config.vision_use_head", "text", "yes"),
  ("siglip", "vision_config.image_size", "not square", [32, 48]),
  ("siglip", "text_config.max_position_embeddings", "huge", HUGE),
  ("siglip", "text_config.projection_size", "text", "x"),
  ("siglip", "model_type", "a list", ["siglip"]),
  ("siglip", "model_type", "an object", {}),
  ("siglip", "model_type", "unknown", "siglop"),
  ("siglip", "model_type", "of a million characters", "x" * 1_000_000),
  ("siglip", "vision_config.hidden_act", "of a million", "x" * 1_000_000),
  ("clip", "text_config.eos_token_id", "text", "x"),
  ("clip", "text_config.eos_token_id", "an empty list", []),
  ("clip", "text_config.hidden_size", "a fraction", 32.5),
  ("clip", "projection_dim", "a list", [32]),
  ("dinov2", "mlp_ratio", "nan", NAN),
  ("dinov2", "mlp_ratio", "huge", 1e30),
  ("dinov2", "mlp_ratio", "negative", -4),
  ("dinov2", "layerscale_value", "text", "x"),
  ("dinov2", "qkv_bias", "false", False),
  ("dinov2", "use_swiglu_ffn", "text", "x"),
  ("dinov3", "rope_theta", "nan", NAN),
  ("dinov3", "pos_embed_jitter", "text", "x"),
  ("dinov3", "query_bias", "false", False),
  ("dinov3", "use_gated_mlp", "a number", 2),
  ("siglip2", "num_patches", "no square", 5),
  ("aimv2", "rms_norm_eps", "nan", NAN),
  ("aimv2", "qkv_bias", "true", True),
  ("aimv2", "hidden_act", "another", "gelu"),
  ("radio", "norm_std", "zero", [0, 1, 1]),
  ("radio", "norm_mean", "text", "x"),
  ("radio", "video_temporal_patch_size", "of videos", 2),
  ("tipsv2", "qkv_bias", "false", False),
  ("tipsv2", "hidden_act", "unknown", "swish"),
  ("depth_anything", "neck_hidden_sizes", "a number", 4),
  ("depth_anything", "neck_hidden_sizes", "empty", []),
  ("depth_anything", "neck_hidden_sizes", "huge", [HUGE] * 4),
  ("depth_anything", "reassemble_factors", "nan", [NAN] * 4),
  ("depth_anything", "reassemble_factors", "text", "4,2,1"),
  ("depth_anything", "max_depth", "nan", NAN),
  ("depth_anything", "depth_estimation_type", "metric", "metric"),
  ("depth_anything", "backbone_config.out_indices", "text", ["a"] * 4),
  ("depth_anything", "backbone_config.out_indices", "huge", [HUGE] * 4),
  ("depth_anything", "backbone_config.layer_norm_eps", "nan", NAN),
  ("depth_anything", "backbone_config.model_type", "another", "beit"),
  ("owlv2", "text_config", "text", "x"),
  ("owlv2", "vision_config.image_size", "negative", [-32, -32]),
):
  _add_config(_family, _keys, _label, _value)
for _family, _keys, _label, _value, _match in (
  ("siglip", "vision_config.image_size", "below the patch", 8, "patch_size"),
  ("siglip", "vision_config.num_attention_heads", "no divisor", 3, "divi"),
  ("siglip", "vision_config.num_hidden_layers", "of others", 2, "layers"),
  ("siglip", "model_type", "missing", ..., "model_type"),
  ("depth_anything", "model_type", "of others", "siglip", "model_type"),
):
  _add_config(_family, _keys, _label, _value, match=_match)
# transformers has defaults for what is null or missing; these fit no tensor.
for _family in ("siglip", "clip", "owlv2"):
  for _label, _value in (("missing", ...), ("null", None)):
    _keys = "vision_config.hidden_size"
    _add_config(_family, _keys, _label, _value, match="768")
for _key, _value in (("unknown_key", HUGE), ("torch_dtype", ["x"])):
  _add_config("siglip", _key, "odd", _value, expects="used", match="")

for _label, _data in samples.BROKEN.items():
  _run = samples.replacing("siglip", "config.json", lambda _, d=_data: d)
  CONFIGS.add(f"config.json {_label}", _run, match="config.json")


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


@CONFIGS.parametrize
def test_configs(case, hostile):
  hostile(case)


def _processor(content, family="clip", name="preprocessor_config.json"):
  def run(folder):
    path = samples.copy(family, folder)
    samples.write_json(path / name, content)
    return samples.read(family, path)

  return run


for _label, _content in {
  "size text": {"size": "x"},
  "size zero": {"size": 0},
  "size negative": {"size": {"height": -32, "width": -32}},
  "size huge": {"size": HUGE},
  "size a pair of text": {"size": {"height": "a", "width": "b"}},
  "size without a width": {"size": {"height": 32}},
  "size not square": {"size": {"height": 32, "width": 64}},
  "shortest_edge text": {"size": {"shortest_edge": "x"}},
  "shortest_edge zero": {"size": {"shortest_edge": 0}},
  "shortest_edge huge": {"size": {"shortest_edge": HUGE}},
  "longest_edge": {"size": {"shortest_edge": 32, "longest_edge": 64}},
  "crop_size text": {"size": 32, "crop_size": "x"},
  "crop_size larger": {"size": 32, "crop_size": 64},
  "crop_size below the patch": {"size": 32, "crop_size": 8},
  "resample text": {"resample": "bicubic"},
  "resample unknown": {"resample": 7},
  "resample a list": {"resample": [3]},
  "image_mean text": {"image_mean": "x"},
  "image_mean a number": {"image_mean": 0.5},
  "image_mean of one": {"image_mean": [0.5]},
  "image_mean nan": {"image_mean": [NAN] * 3},
  "image_std zero": {"image_std": [0, 0, 0]},
  "image_std negative": {"image_std": [-1, -1, -1]},
  "image_std nan": {"image_std": [NAN] * 3},
  "rescale_factor zero": {"rescale_factor": 0},
  "rescale_factor text": {"rescale_factor": "x"},
  "rescale_factor nan": {"rescale_factor": NAN},
  "do_resize text": {"do_resize": "no"},
  "do_center_crop a number": {"do_center_crop": 2},
  "do_normalize a list": {"do_normalize": [1]},
}.items():
  _run = _processor(_content)
  PROCESSORS.add(_label, _run, match="preprocessor_config.json")
for _label, _content in {
  "of text": {"image_processor": "x"},
  "of a list": {"image_processor": [1]},
  "of text std": {"image_processor": {"image_std": "x"}},
}.items():
  _run = _processor(_content, name="processor_config.json")
  PROCESSORS.add(f"version 5 {_label}", _run, match="processor_config.json")
for _label, _content in {
  "mean text": {"image_mean": "x"},
  "std zero": {"image_std": [0, 0, 0]},
  "mean of two": {"image_mean": [0, 0]},
}.items():
  _run = _processor(_content, "owlv2")
  PROCESSORS.add(f"owlv2 {_label}", _run, match="preprocessor_config.json")
for _label, _data in samples.BROKEN.items():
  _run = samples.replacing(
    "clip", "preprocessor_config.json", lambda _, d=_data: d
  )
  PROCESSORS.add(_label, _run, match="preprocessor_config.json")


@PROCESSORS.parametrize
def test_processors(case, hostile):
  hostile(case)
