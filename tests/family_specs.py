"""Tiny image towers with the options of each family, as sections `model`."""

BLOCK = {"variant": "mu/16", "depth": 2, "image_size": 64}
# Written by `huggingface.write`, by model type.
EXPORTED = {
  "aimv2_vision_model": {
    **BLOCK,
    "pool": "query",
    "patch_norm": True,
    "norm_kind": "rms",
    "mlp": "swiglu",
    "qkv_bias": "none",
    "bias": False,
  },
  "radio": {
    **BLOCK,
    "pool": "cls",
    "registers": 3,
    "pool_tokens": (0, 1),
    "patch_bias": False,
    "final_norm": False,
    "position_resize": "crop",
  },
  "tipsv2_vision_model": {
    **BLOCK,
    "pool": "cls",
    "registers": 1,
    "layer_scale": 1.0,
    "position_resize": "bilinear_antialiased",
  },
}
SPECS = {
  **EXPORTED,
  "dinov3_vit": {
    **BLOCK,
    "pool": "cls",
    "registers": 4,
    "layer_scale": 1.0,
    "positions": "rope",
    "qkv_bias": "query_value",
    "mask_token": True,
  },
  "perception_encoder": {  # The spatial one.
    **BLOCK,
    "pool": "mean",
    "positions": "learned_rope",
    "layer_scale": 0.1,
    "pre_norm": True,
    "final_norm": False,
    "patch_bias": False,
    "position_resize": "antialiased",
  },
  "siglip2_vision_model": {  # NaFlex.
    **BLOCK,
    "pool": "map",
    "position_resize": "bilinear_antialiased",
  },
}

_TEXT = {"variant": "mu", "length": 12, "vocab_size": 258}
_AIM = EXPORTED["aimv2_vision_model"]
_AIM_BLOCK = {k: _AIM[k] for k in ("norm_kind", "mlp", "qkv_bias", "bias")}
_EOS = {"pool": "eos", "causal": True, "projection_bias": False}
# With text towers, also written by `huggingface.write`.
TEXT_SPECS = {
  "siglip": {**BLOCK, "text": _TEXT},
  "clip": {
    **BLOCK,
    "pool": "cls",
    "pre_norm": True,
    "patch_bias": False,
    "projection": 64,
    "text": {**_TEXT, **_EOS},
  },
  "aimv2": {
    **_AIM,
    "projection": 64,
    "text": {**_TEXT, **_EOS, **_AIM_BLOCK},
  },
  "tipsv2": {
    **EXPORTED["tipsv2_vision_model"],
    "text": {
      **_TEXT,
      "pool": "mean",
      "projection": None,
      "projection_bias": False,
      "positions": "sinusoidal",
      "token_scale": True,
      "pad_id": 0,
    },
  },
}


def preprocess_of(kind):
  """Fields of `Preprocess`."""
  fields = {"size": 64}
  if kind == "siglip2_vision_model":
    fields |= {"resize": "native", "patch_size": 16, "max_patches": 16}
  return fields
