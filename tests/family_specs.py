"""Tiny towers with the options of each family, as sections `model`."""

BLOCK = {"variant": "mu/16", "depth": 2, "image_size": 64}
_CLS = {**BLOCK, "pool": "cls"}
_ROPE = {**_CLS, "positions": "rope"}
_AIM_BLOCK = dict(norm_kind="rms", mlp="swiglu", qkv_bias="none", bias=False)
_WIDE = {"position_resize": "bilinear_antialiased"}
# Image towers that `huggingface.write` exports, by model type.
EXPORTED = {
  "siglip_vision_model": BLOCK,
  "siglip2_vision_model": {**BLOCK, **_WIDE},  # NaFlex.
  "dinov2": _CLS,
  "dinov2_with_registers": {**_CLS, "registers": 2, "layer_scale": 0.1},
  "dinov3_vit": dict(
    **_ROPE, registers=4, layer_scale=1.0, qkv_bias="query_value",
    mask_token=True,
  ),
  "aimv2_vision_model": dict(
    **BLOCK, **_AIM_BLOCK, pool="query", patch_norm=True
  ),
  "radio": dict(
    **_CLS, registers=3, pool_tokens=(0, 1), patch_bias=False, final_norm=False,
    position_resize="crop",
  ),
  "tipsv2_vision_model": dict(**_CLS, **_WIDE, registers=1, layer_scale=1.0),
}  # fmt: skip
# Further models, by the model type that they are exported as.
VARIANTS = {
  "dinov2": {
    "DINO": {"gelu": "exact"},
    "swiglu": {"layer_scale": 0.1, "mlp": "swiglu", "mlp_dim": 128},
    "MAE": {"positions": "sincos", "norm_eps": 1e-5},
  },
  "dinov3_vit": {
    "jitter": {"rope": {"jitter": 1.5}, "layer_scale": None},
    "gated": {"registers": 0, "mlp": "swiglu", "mlp_dim": 120},
  },
  "siglip_vision_model": {"headless": {"pool": "mean"}},
  "siglip2_vision_model": {"headless": {"pool": "mean"}},
  "aimv2_vision_model": {"headless": {"pool": "mean"}},
}
_NAMES = ("siglip2", "dinov3", "aimv2", "radio", "tipsv2")
SPECS = {k: v for k, v in EXPORTED.items() if k.startswith(_NAMES)}
SPECS["perception_encoder"] = dict(  # The spatial one.
  **BLOCK, pool="mean", positions="learned_rope", layer_scale=0.1,
  pre_norm=True, final_norm=False, patch_bias=False,
  position_resize="antialiased",
)  # fmt: skip

_TEXT = {"variant": "mu", "length": 12, "vocab_size": 258}
_EOS = dict(_TEXT, pool="eos", causal=True, projection_bias=False)
# With text towers, also written by `huggingface.write`.
TEXT_SPECS = {
  "siglip": {**BLOCK, "text": _TEXT},
  "clip": dict(_CLS, pre_norm=True, patch_bias=False, projection=64, text=_EOS),
  "aimv2": dict(
    EXPORTED["aimv2_vision_model"], projection=64, text=_EOS | _AIM_BLOCK
  ),
  "tipsv2": dict(
    EXPORTED["tipsv2_vision_model"],
    text=dict(
      _TEXT, pool="mean", projection=None, projection_bias=False,
      positions="sinusoidal", token_scale=True, pad_id=0,
    ),
  ),
}  # fmt: skip


def exported_cases():
  """(model type, section `model`) of every exported image tower, by name."""
  cases = {kind: (kind, fields) for kind, fields in EXPORTED.items()}
  for kind, variants in VARIANTS.items():
    for name, fields in variants.items():
      cases[f"{kind}_{name}"] = (kind, {**EXPORTED[kind], **fields})
  return cases


def preprocess_of(kind):
  """Fields of `Preprocess`."""
  fields = {"size": 64}
  if kind.startswith("siglip2"):
    fields |= {"resize": "native", "patch_size": 16, "max_patches": 16}
  return fields
