"""Released layouts against transformers and timm, read and written.

Each kind is a tiny model of random weights: its towers, at several sizes of
images, and its texts have equal outputs here, and its export opens there.
"""

import json

import library_process
import numpy as np
import pytest
import tower_parity as parity

import mtv_jax
from mtv_jax.convert import (
  clip,
  hf_files,
  huggingface,
  native,
  tensors,
  timm,
)
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess

pytestmark = [
  pytest.mark.reference,
  # Deprecations inside transformers and timm.
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
MLP = parity.tower(48, 3, 4, 96, image_size=64, patch_size=16)
TOWER = {k: v for k, v in MLP.items() if k != "intermediate_size"}
TEXT = parity.tower(32, 2, 2, 64, vocab_size=99, max_position_embeddings=12)
END_TEXT = {**TEXT, "eos_token_id": 98}
SIGLIP = {
  "vision_config": MLP,
  "text_config": {**TEXT, "projection_size": 48, "layer_norm_eps": 1e-5},
}
CLIP = {"vision_config": MLP, "text_config": END_TEXT, "projection_dim": 40}
RADIO = {
  **TOWER,
  "mlp_ratio": 2.0,
  "num_cls_tokens": 3,
  "num_registers": 2,
  "max_img_size": 160,
  "summary_idxs": [0, 2],
}
TIPS = {**TOWER, "mlp_ratio": 2, "num_register_tokens": 2}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
ROPE = {"rope_theta": 50.0, "pos_embed_rescale": None, "pos_embed_shift": 0.1}
STORED = ((64, 64),)
# At another size both sides resample the positions; antialiasing matters most
# if they shrink.
ANY = ((64, 64), (48, 160))
# By kind: the class, its config, the sizes of images.
KINDS = {
  "siglip": ("SiglipModel", SIGLIP, ANY),
  # SigLIP 2 of fixed resolution has SigLIP's classes, and different sizes.
  "siglip2": (
    "SiglipModel",
    {
      "vision_config": {**MLP, "patch_size": 8},
      "text_config": {**TEXT, "projection_size": 48, "vocab_size": 300},
    },
    STORED,
  ),
  "siglip_vision": ("SiglipVisionModel", {**MLP, "hidden_act": "gelu"}, STORED),
  "siglip_headless": (
    "SiglipVisionModel", {**MLP, "vision_use_head": False}, STORED,
  ),
  "clip": ("CLIPModel", CLIP, ANY),
  # The rule of old files: the highest id is the end.
  "clip_old": (
    "CLIPModel", {**CLIP, "text_config": {**TEXT, "eos_token_id": 2}}, STORED,
  ),
  # The end's id is not the highest.
  "metaclip_2": (
    "MetaClip2Model",
    {**CLIP, "text_config": {**TEXT, "eos_token_id": 2}},
    STORED,
  ),
  "clip_vision": ("CLIPVisionModel", MLP, STORED),
  "clip_projected": (
    "CLIPVisionModelWithProjection", {**MLP, "projection_dim": 40}, STORED,
  ),
  "dinov2": (
    "Dinov2Model", {**TOWER, "mlp_ratio": 2, "layerscale_value": 0.5}, ANY,
  ),
  "dinov2_swiglu": ("Dinov2Model", {**TOWER, "use_swiglu_ffn": True}, STORED),
  "dinov2_registers": (
    "Dinov2WithRegistersModel", {**TOWER, "num_register_tokens": 3}, ANY,
  ),
  "dinov3": ("DINOv3ViTModel", {**MLP, "num_register_tokens": 2}, ((64, 96),)),
  "dinov3_gated": (
    "DINOv3ViTModel", {**MLP, **GATED, **ROPE, "num_register_tokens": 3}, ANY,
  ),
  "dinov3_without_biases": (
    "DINOv3ViTModel",
    {**MLP, "query_bias": False, "value_bias": False},
    ((64, 96),),
  ),
  "dinov3_biases": (
    "DINOv3ViTModel",
    {**MLP, "key_bias": True, "layerscale_value": 1e-5},
    ((64, 96),),
  ),
  "aimv2": ("Aimv2Model", CLIP, STORED),
  "aimv2_vision": ("Aimv2VisionModel", MLP, STORED),
  "aimv2_headless": ("Aimv2VisionModel", {**MLP, "use_head": False}, STORED),
  "aimv2_native": ("Aimv2VisionModel", {**MLP, "is_native": True}, ANY),
  "radio": ("RadioModel", RADIO, ANY),
  "radio_swiglu": ("RadioModel", {**RADIO, "use_swiglu_ffn": True}, STORED),
  "tipsv2": (
    "Tipsv2Model",
    {
      "vision_config": {**TIPS, "num_register_tokens": 1},
      "text_config": {**TEXT, "hidden_size": 48},
    },
    STORED,
  ),
  "tipsv2_vision": ("Tipsv2VisionModel", TIPS, ANY),
  "tipsv2_swiglu": (
    "Tipsv2VisionModel",
    {**TIPS, "use_swiglu_ffn": True, "num_register_tokens": 0},
    STORED,
  ),
}  # fmt: skip


def image_pairs(model, ours, size):
  """Outputs of the image tower to compare: every layer, tokens, pooled."""
  import torch

  images = parity.pixels(2, *size)
  vision = getattr(model, "vision_model", model)
  options = {"output_hidden_states": True}
  if type(model).__name__.startswith(("Siglip", "CLIP")):
    options["interpolate_pos_encoding"] = size != (64, 64)
  with torch.no_grad():
    theirs = vision(pixel_values=parity.as_torch(images), **options)
    out = parity.run_image(ours, images)
    if hasattr(vision, "post_layernorm") and hasattr(vision, "pre_layrnorm"):
      # CLIP's last state lacks the norm that its pooled token has.
      last = vision.post_layernorm(theirs.last_hidden_state)
      theirs.last_hidden_state = last
    pairs = parity.image_pairs(out, theirs)
    if hasattr(theirs, "summary"):
      pairs["pooled"] = (out.pooled, theirs.summary)
      pairs["patches"] = (out.patches, theirs.features)
    elif getattr(model, "visual_projection", None) is not None:
      projected = model.visual_projection(theirs.pooler_output)
      pairs["pooled"] = (out.pooled, projected)
    elif theirs.pooler_output is None:
      pairs["pooled"] = (out.pooled, theirs.last_hidden_state.mean(1))
  return pairs


def assert_equal_texts(model, ours):
  """The text tower's tokens and the logits, of texts of several lengths."""
  import torch

  rng, text = np.random.default_rng(2), ours.spec.text
  images = parity.pixels(3, 64, 64)
  tokens = rng.integers(3, 90, (4, 12)).astype(np.int32)
  ends = np.array((3, 6, 12, 8))
  mask = np.arange(12) < ends[:, None]
  end = text.eos_id if text.pool == "first_eos" else 98
  tokens[~mask] = end if text.pad_id is None else text.pad_id
  if "eos" in text.pool:
    tokens[np.arange(4), ends - 1] = end
  options = {}
  if type(model).__name__ in ("Aimv2Model", "Tipsv2Model"):
    options["attention_mask"] = torch.from_numpy(mask).long()
  else:
    mask = np.ones_like(mask)  # Padding is attended to.
  with torch.no_grad():
    theirs = model(
      pixel_values=parity.as_torch(images),
      input_ids=torch.from_numpy(tokens).long(),
      **options,
    )
  out = parity.run_text(ours, tokens)
  last = theirs.text_model_output.last_hidden_state.numpy()
  parity.largest_difference(
    {"tokens": (np.asarray(out.tokens)[mask], last[mask])}
  )
  preprocess = Preprocess.from_dict(ours.preprocess)
  encoder = Encoder(ours.spec, ours.params, preprocess)
  image = parity.run_image(ours, images)
  logits = encoder.similarity(np.asarray(image.pooled), np.asarray(out.pooled))
  expected = theirs.logits_per_image.numpy()
  assert np.ptp(expected) > 0.01
  # TIPSv2 divides by a temperature of 0.005: cosines within 5e-7.
  atol = 2e-4 if text.pad_id is not None else parity.TOLERANCE
  np.testing.assert_allclose(logits, expected, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_families_equal_transformers(kind, tmp_path, record_property):
  class_name, config, sizes = KINDS[kind]
  model = parity.save_model(tmp_path / "a", class_name, **config)
  ours = huggingface.read(tmp_path / "a")
  parity.remove_normalization(model)
  worst = max(
    parity.largest_difference(image_pairs(model, ours, size)) for size in sizes
  )
  record_property("difference", worst)
  print(f"{kind}: {worst:.2e}")
  if ours.spec.text is not None:
    assert_equal_texts(model, ours)
  folder = huggingface.write(tmp_path / "b", ours)
  want = Preprocess.from_dict(ours.preprocess)
  for has_info in (True, False):
    back = huggingface.read(folder)
    assert back.spec == ours.spec
    got = Preprocess.from_dict(back.preprocess)
    np.testing.assert_allclose(got.mean, want.mean, atol=1e-7)
    np.testing.assert_allclose(got.std, want.std, atol=1e-7)
    if has_info:
      assert got == want
      (folder / "mtv_jax.json").unlink()
    parity.assert_same_params(back.params, ours.params)
  opened = library_process.load_model(folder, class_name)
  parity.remove_normalization(opened)
  parity.largest_difference(image_pairs(opened, ours, sizes[-1]))
  if ours.spec.text is not None:
    assert_equal_texts(opened, ours)


@pytest.mark.parametrize(
  ("how", "class_name", "config", "options"),
  [
    ("sharded", "SiglipModel", SIGLIP, {"max_shard_size": "60KB"}),
    ("bfloat16", "SiglipModel", SIGLIP, {}),
    ("classifier", "SiglipForImageClassification", SIGLIP, {}),
    ("old", "SiglipVisionModel", MLP, {}),
  ],
)
def test_other_forms_of_files(how, class_name, config, options, tmp_path):
  """Shards, half precision, a classifier's head, names of transformers 4."""
  import torch
  from safetensors.numpy import load_file, save_file

  dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
  model = parity.save_model(
    tmp_path, class_name, dtype=dtype, options=options, **config
  )
  if how == "sharded":
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
  if how == "old":
    file = str(tmp_path / "model.safetensors")
    renamed = {f"vision_model.{k}": v for k, v in load_file(file).items()}
    renamed["vision_model.embeddings.position_ids"] = np.arange(16)[None]
    save_file(renamed, file)
  ours = huggingface.read(tmp_path)
  assert (ours.spec.text is None) == (how in ("classifier", "old"))
  prefix = "" if how == "old" else "vision_model."
  expected = model.state_dict()[f"{prefix}encoder.layers.2.mlp.fc2.weight"]
  got = ours.params["image"]["blocks"]["mlp"]["fc2"]["kernel"]
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got[2], expected.float().numpy().T)


# Keys that are only written, or that mean another key if they are missing.
OWN_DEFAULTS = {f"{token}_token_id" for token in ("bos", "eos", "pad")}
OWN_DEFAULTS |= {"image_size", "projection_size"}


@pytest.mark.parametrize("family", huggingface.FAMILIES, ids=lambda f: f.name)
def test_defaults_are_those_of_transformers(family):
  """A config.json has only the differences from them."""
  transformers = pytest.importorskip("transformers")
  name = f"{family.class_name}{'Vision' if family.text else ''}Config"
  sections = [(name, family.image.defaults)]
  if family.text:
    name = f"{family.class_name}TextConfig"
    sections.append((name, family.text.defaults))
  for name, defaults in sections:
    theirs = getattr(transformers, name)().to_dict()
    for key in defaults.keys() - OWN_DEFAULTS:
      want = theirs.get(key)
      want = tuple(want) if isinstance(want, list) else want
      assert want is None or defaults[key] == want, key


def test_the_second_section_of_early_clips_wins():
  transformers = pytest.importorskip("transformers")
  twice = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 512, "eos_token_id": 2},
    "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
    "vision_config": {"hidden_size": 1024, "num_attention_heads": 16},
  }
  ours = clip.CLIP.read_spec(twice, ["text_model.head.weight"])
  full = transformers.CLIPConfig(**twice)
  assert ours.text.width == full.text_config.hidden_size == 768
  assert ours.text.eos_id == full.text_config.eos_token_id
  assert ours.image.patch_size == full.vision_config.patch_size


def test_radio_normalises_pixels_as_the_model_does(tmp_path):
  import torch

  model = parity.save_model(tmp_path, "RadioModel", **RADIO)
  processor = {"do_normalize": False, "size": {"height": 64, "width": 64}}
  path = tmp_path / "preprocessor_config.json"
  path.write_text(json.dumps(processor))
  image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  with torch.no_grad():
    theirs = model(parity.as_torch(np.float32(image)[None] / 255))
  ours = mtv_jax.load(tmp_path).image([image])
  assert ours.pooled.shape == (1, 2 * 48)
  np.testing.assert_allclose(ours.pooled, theirs.summary, atol=1e-4)


def test_dense_heads_of_tips_equal_transformers(tmp_path):
  import torch

  backbone = TOWER | dict(
    model_type="tipsv2_vision_model",
    num_hidden_layers=4,
    mlp_ratio=2,
    out_indices=[1, 2, 3, 4],
    apply_layernorm=True,
    reshape_hidden_states=False,
  )

  def shrink(model):
    # As initialised, maps grow to thousands.
    for name, parameter in model.named_parameters():
      parameter.data.mul_(1 if "backbone" in name else 0.5)

  model = parity.save_model(
    tmp_path,
    "Tipsv2DptForDensePrediction",
    scale=0.02,
    change=shrink,
    backbone_config=backbone,
    neck_hidden_sizes=[8, 12, 16, 20],
    fusion_hidden_size=16,
    num_depth_bins=10,
    num_labels=5,
  )
  described = huggingface.read(tmp_path, with_params=False)
  assert described.params == {} and len(described.prediction_heads) == 3
  encoder = mtv_jax.load(tmp_path)
  # 3 x 5 patches: some stages must be resized to the next one's size.
  images = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), np.uint8)
  with torch.no_grad():
    theirs = model(parity.as_torch(np.float32(images) / 255))
  expected = {
    "metric_depth": theirs.predicted_depth,
    "normals": theirs.normals.permute(0, 2, 3, 1),
    "segmentation": theirs.segmentation_logits.permute(0, 2, 3, 1),
  }
  for name, want in expected.items():
    (got,) = encoder.predict(name, images, resize=False).values()
    parity.largest_difference({name: (got, want)})


# ---------------------------------------------------------------------------
# timm.

SIDE = {"img_size": 64}
PE_L = {"img_size": 56, "embed_dim": 64}
PE_G = {"img_size": 56, "embed_dim": 128}
TIMM = {
  "vit_pe_core_tiny_patch16_384": SIDE,
  "vit_pe_spatial_tiny_patch16_512": SIDE,
  "vit_pe_lang_large_patch14_448": PE_L,
  "vit_pe_core_gigantic_patch14_448": PE_G,
  "vit_base_patch16_clip_quickgelu_224": {**SIDE, "embed_dim": 96},
  "vit_so150m_patch16_reg4_map_256": {**SIDE, "embed_dim": 112},
  "vit_small_patch14_reg4_dinov2": {"img_size": 70, "embed_dim": 96},
  "vit_giant_patch14_dinov2": {"img_size": 56, "embed_dim": 96},
  "vit_small_plus_patch16_dinov3": {**SIDE, "embed_dim": 96},
  "vit_small_patch16_dinov3_qkvb": {**SIDE, "embed_dim": 96},
  "aimv2_large_patch14_224": {"img_size": 56, "embed_dim": 96},
  "eva02_tiny_patch14_336": {"img_size": 56, "embed_dim": 48},
  "eva02_base_patch14_448": {"img_size": 56, "embed_dim": 96},
  "eva02_large_patch14_224": {**PE_G, "global_pool": "token"},
  "eva_giant_patch14_224": PE_L,
  "vit_base_patch16_224": {**SIDE, "embed_dim": 96, "global_pool": "avg"},
}


def save_timm(folder, name, *, scale=0.1, config=(), **options):
  torch = pytest.importorskip("torch")
  timm = pytest.importorskip("timm")
  safetensors = pytest.importorskip("safetensors.torch")
  torch.manual_seed(0)
  options = {"num_classes": 0, "dynamic_img_size": True, **options}
  model = parity.add_noise(timm.create_model(name, **options), scale=scale)
  if options["num_classes"]:
    model.head.bias.data.zero_()  # PE's projection has none.
  state = {k: v.contiguous() for k, v in model.state_dict().items()}
  safetensors.save_file(state, folder / "model.safetensors")
  config = {
    "architecture": name,
    "num_classes": options["num_classes"],
    "model_args": {k: v for k, v in options.items() if k != "num_classes"},
    "pretrained_cfg": {
      "mean": [0.5, 0.4, 0.5],
      "interpolation": "bilinear",
      "input_size": [3, *[options.get("img_size", 224)] * 2],
      **dict(config),
    },
  }
  (folder / "config.json").write_text(json.dumps(config))
  return model


def timm_difference(model, ours, size):
  import torch

  images = parity.pixels(2, *size)
  with torch.no_grad():
    pixels = parity.as_torch(images)
    last, layers = model.forward_intermediates(
      pixels, return_prefix_tokens=False, output_fmt="NLC"
    )
    pooled = model(pixels)
  out = parity.run_image(ours, images)
  first = ours.spec.image.prefix
  tokens = np.concatenate([out.prefix, out.patches], axis=1)
  pairs = {"pooled": (out.pooled, pooled), "last": (tokens, last)}
  for i, layer in enumerate(layers):
    pairs[f"layer {i}"] = (out.intermediates[i][:, first:], layer)
  return parity.largest_difference(pairs)


@pytest.mark.parametrize("name", TIMM)
def test_towers_equal_timm(name, tmp_path, record_property):
  model = save_timm(tmp_path, name, depth=2, **TIMM[name])
  ours = huggingface.read(tmp_path)
  side, patch = TIMM[name]["img_size"], ours.spec.image.patch_size
  worst = timm_difference(model, ours, (side + patch, side - patch))
  record_property("difference", worst)
  described = huggingface.read(tmp_path, with_params=False)
  assert described.params == {} and described.spec == ours.spec
  preprocess = Preprocess.from_dict(ours.preprocess)
  assert preprocess.mean == (0.5, 0.4, 0.5)
  assert preprocess.interpolation == "bilinear"
  # The layout of queries and keys is restored by the inverse.
  with hf_files.open_weights(tmp_path) as store:
    mapping = timm.param_mapping(ours.spec, store)
  state = tensors.save(mapping, native.numpy_leaves(ours.params))
  for key, value in model.state_dict().items():
    if key not in ("cls_token", "reg_token", "pos_embed"):
      np.testing.assert_array_equal(state[key], value.numpy(), err_msg=key)


# ---------------------------------------------------------------------------
# True widths.

DEPTH = {"num_hidden_layers": 3}
RADIO_B = {"hidden_size": 768, "num_attention_heads": 12}
TRUE = {
  "aimv2": ("Aimv2VisionModel", DEPTH, (224, 224)),
  # The whole model.
  "dinov3_s": (
    "DINOv3ViTModel", {**GATED, "num_register_tokens": 4}, (256, 160),
  ),
  "radio": ("RadioModel", {**DEPTH, **RADIO_B}, (160, 256)),
  "tipsv2": ("Tipsv2VisionModel", DEPTH, (224, 280)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind",
  [
    kind if kind == "dinov3_s" else pytest.param(kind, marks=pytest.mark.long)
    for kind in TRUE
  ],
)
def test_true_widths_equal_transformers(kind, tmp_path, record_property):
  class_name, config, size = TRUE[kind]
  model = parity.save_model(tmp_path, class_name, scale=0.01, **config)
  ours = huggingface.read(tmp_path)
  parity.remove_normalization(model)
  worst = parity.largest_difference(image_pairs(model, ours, size))
  record_property("difference", worst)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "size"),
  [
    ("vit_pe_core_base_patch16_224", (256, 160)),
    pytest.param("eva02_base_patch14_224", (252, 168), marks=pytest.mark.long),
  ],
)
def test_true_widths_equal_timm(name, size, tmp_path):
  model = save_timm(tmp_path, name, scale=0.01, depth=3)
  timm_difference(model, huggingface.read(tmp_path), size)
