"""AIMv2, RADIO, TIPSv2 and Perception Encoders against their libraries."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import tokenizer_parity
import tokenizers
import tower_parity as parity
from family_specs import BLOCK, EXPORTED, SPECS, preprocess_of

import mtv_jax
from mtv_jax.convert import (
  huggingface,
  native,
  perception_encoder,
  tensors,
)
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models.two_tower import ModelSpec

reference = pytest.mark.reference
# Deprecations inside transformers and timm.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TOWER = {
  "hidden_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "image_size": 64,
  "patch_size": 16,
}
MLP = {"intermediate_size": 96}
TEXT = {
  "intermediate_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "vocab_size": 99,
  "max_position_embeddings": 12,
}
RADIO = {
  "num_cls_tokens": 3,
  "num_registers": 2,
  "max_img_size": 160,
  "summary_idxs": [0, 2],
}
TIPS_TEXT = {**TEXT, "hidden_size": 48}


def _build(t, kind):
  """A model of transformers, and the sizes of images it is compared at."""
  square, any_size = ((64, 64),), ((64, 64), (96, 64), (48, 160))
  aim = {**TOWER, **MLP}
  aim_text = {**TEXT, "hidden_size": 32, "eos_token_id": 98}
  if kind.startswith("aimv2_vision"):
    native = kind.endswith("native")
    config = t.Aimv2VisionConfig(
      **aim, is_native=native, use_head="headless" not in kind
    )
    return t.Aimv2VisionModel(config), any_size if native else square
  if kind == "aimv2":
    config = t.Aimv2Config(
      vision_config=aim, text_config=aim_text, projection_dim=40
    )
    return t.Aimv2Model(config), square
  if kind.startswith("radio"):
    config = t.RadioConfig(
      **TOWER, **RADIO, mlp_ratio=2.0, use_swiglu_ffn=kind == "radio_swiglu"
    )
    return t.RadioModel(config), any_size
  vision = {
    **TOWER,
    "mlp_ratio": 2,
    "use_swiglu_ffn": kind == "tipsv2_vision_swiglu",
  }
  if kind == "tipsv2":
    config = t.Tipsv2Config(vision_config=vision, text_config=TIPS_TEXT)
    return t.Tipsv2Model(config), any_size
  vision["num_register_tokens"] = 0 if kind.endswith("swiglu") else 2
  return t.Tipsv2VisionModel(t.Tipsv2VisionConfig(**vision)), any_size


KINDS = {
  "aimv2_vision": "Aimv2VisionModel",
  "aimv2_vision_headless": "Aimv2VisionModel",
  "aimv2_vision_headless_native": "Aimv2VisionModel",
  "aimv2_vision_native": "Aimv2VisionModel",
  "aimv2": "Aimv2Model",
  "radio": "RadioModel",
  "radio_swiglu": "RadioModel",
  "tipsv2": "Tipsv2Model",
  "tipsv2_vision": "Tipsv2VisionModel",
  "tipsv2_vision_swiglu": "Tipsv2VisionModel",
}


def _saved(folder, kind, *, build=_build, scale=0.1):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  model, sizes = build(transformers, kind)
  temperature = getattr(model, "temperature", None)
  before = temperature is not None and temperature.detach().clone()
  model = parity.add_noise(model, scale=scale)
  if temperature is not None:
    temperature.data.copy_(before)
  model.save_pretrained(folder)
  return model, sizes


def _pairs(model, ours, images):
  """Outputs of the image tower to compare."""
  import torch

  vision = getattr(model, "vision_model", model)
  with torch.no_grad():
    pixels = parity.as_torch(images)
    theirs = vision(pixel_values=pixels, output_hidden_states=True)
    out = parity.run_image(ours, images)
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


def _neutralise(model):
  """RADIO normalises pixels itself; the towers are compared after that."""
  if hasattr(model, "input_conditioner"):
    model.make_preprocessor_external()


@reference
@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_families_equal_transformers(kind, tmp_path, record_property):
  model, sizes = _saved(tmp_path / "a", kind)
  ours = huggingface.read(tmp_path / "a")
  _neutralise(model)
  worst = 0.0
  for height, width in sizes:
    images = parity.pixels(2, height, width)
    pairs = _pairs(model, ours, images)
    worst = max(worst, parity.largest_difference(pairs))
  record_property("difference", worst)
  print(f"{kind}: {worst:.2e}")
  folder = huggingface.write(tmp_path / "b", ours)
  back = huggingface.read(folder)
  assert back.spec == ours.spec
  got, want = map(Preprocess.from_dict, (back.preprocess, ours.preprocess))
  assert got == want
  parity.assert_same_params(back.params, ours.params)
  (folder / "mtv_jax.json").unlink()
  plain = huggingface.read(folder)
  assert plain.spec == ours.spec
  np.testing.assert_allclose(plain.preprocess["mean"], want.mean, atol=1e-7)
  np.testing.assert_allclose(plain.preprocess["std"], want.std, atol=1e-7)
  parity.assert_same_params(plain.params, ours.params)
  opened = parity.assert_loads_whole(folder, KINDS[kind])
  _neutralise(opened)
  parity.largest_difference(_pairs(opened, ours, images))
  assert mtv_jax.load(folder).spec == ours.spec


@reference
@quiet
@pytest.mark.parametrize("kind", ["aimv2", "tipsv2"])
def test_texts_and_logits_equal_transformers(kind, tmp_path, record_property):
  import torch

  model, _ = _saved(tmp_path, kind)
  ours = huggingface.read(tmp_path)
  rng = np.random.default_rng(2)
  images = parity.pixels(3, 64, 64)
  tokens = rng.integers(3, 90, (4, 12)).astype(np.int32)
  ends = np.array((3, 6, 12, 8))
  mask = np.arange(12) < ends[:, None]
  tokens[~mask] = 0 if kind == "tipsv2" else 98
  if kind == "aimv2":
    tokens[np.arange(4), ends - 1] = 98
  with torch.no_grad():
    theirs = model(
      pixel_values=parity.as_torch(images),
      input_ids=torch.from_numpy(tokens).long(),
      attention_mask=torch.from_numpy(mask).long(),
    )
  text = parity.run_text(ours, tokens)
  last = theirs.text_model_output.last_hidden_state.numpy()
  encoder = Encoder(
    ours.spec, ours.params, Preprocess.from_dict(ours.preprocess)
  )
  image = parity.run_image(ours, images)
  logits = encoder.similarity(np.asarray(image.pooled), np.asarray(text.pooled))
  worst = parity.largest_difference(
    {"tokens": (np.asarray(text.tokens)[mask], last[mask])}
  )
  expected = theirs.logits_per_image.numpy()
  assert np.ptp(expected) > 0.01
  # TIPSv2 divides by a temperature of 0.005: cosines within 5e-7.
  np.testing.assert_allclose(logits, expected, atol=2e-4)
  record_property("difference", worst)
  print(
    f"{kind} text: {worst:.2e}, logits {np.abs(logits - expected).max():.2e}"
  )


def _save_with_tokenizer(folder, kind):
  """A model with a tokenizer as in the released folders."""
  transformers = pytest.importorskip("transformers")
  folder.mkdir()
  if kind == "tipsv2":
    path = folder / "tokenizer.model"
    tokenizer_parity.train_sentencepiece(path, **tokenizer_parity.TIPS)
    fields, size, special = {}, 400, {}
  else:
    size = _save_clip_tokenizer(transformers, folder)
    special = {"eos_token_id": size - 1}
    fields = {
      "image_processor_type": "CLIPImageProcessor",
      "size": {"shortest_edge": 64},
      "crop_size": {"height": 64, "width": 64},
      "resample": 3,
    }

  def build(t, kind):
    model, sizes = _build(t, kind)
    config = model.config
    config.text_config.update({"vocab_size": size, **special})
    return type(model)(config), sizes

  _saved(folder, kind, build=build)
  if fields:
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
  return folder


def _save_clip_tokenizer(transformers, folder):
  """A byte-level BPE whose words have an end; returns its size."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  names = [*letters, *(f"{letter}</w>" for letter in letters)]
  merges = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("p", "h")]
  names += [*map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
  vocab = {name: i for i, name in enumerate(names)}
  tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
  tokenizer.save_pretrained(folder)
  return len(vocab)


@reference
@quiet
@pytest.mark.parametrize("kind", ["aimv2", "tipsv2"])
def test_processors_equal_the_encoder(kind, tmp_path, monkeypatch):
  """Ids of the folder's tokenizer; ids, pixels and logits of the export."""
  import transformers

  monkeypatch.setenv("MTV_JAX_CACHE_DIR", str(tmp_path / "cache"))
  source = _save_with_tokenizer(tmp_path / "a", kind)
  encoder = mtv_jax.load(source)
  theirs = transformers.AutoTokenizer.from_pretrained(source)
  for length in (64, 12, 5):
    tokenizer_parity.assert_equal_ids(encoder.tokenizer, theirs, length)
  folder = huggingface.write(tmp_path / "b", huggingface.read(source))
  processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
  tokenizer_parity.assert_equal_ids(encoder.tokenizer, processor, 12)
  rng = np.random.default_rng(0)
  images = [
    rng.integers(0, 256, (*shape, 3), np.uint8)
    for shape in ((90, 60), (40, 200), (64, 64))
  ]
  # A text is not padding alone, and the tower masks what it contains of it.
  texts = [t for t in tokenizer_parity.TEXTS if t.strip() and "<pad>" not in t]
  inputs = processor(
    images=[PIL.Image.fromarray(image) for image in images],
    text=texts,
    padding="max_length",
    truncation=True,
    return_tensors="pt",
  )
  pixels = np.stack([encoder.preprocess(image) for image in images])
  np.testing.assert_allclose(
    pixels.transpose(0, 3, 1, 2), inputs["pixel_values"], atol=1e-6
  )
  theirs = transformers.AutoModel.from_pretrained(folder)(**inputs)
  encoder = mtv_jax.load(folder)
  np.testing.assert_allclose(
    encoder.similarity(encoder.image(images).pooled, encoder.text(texts)),
    theirs.logits_per_image.detach(),
    atol=2e-4,
  )


@reference
@quiet
def test_radio_normalises_pixels_as_the_model_does(tmp_path):
  import torch

  model, _ = _saved(tmp_path, "radio")
  processor = {"do_normalize": False, "size": {"height": 64, "width": 64}}
  path = tmp_path / "preprocessor_config.json"
  path.write_text(json.dumps(processor))
  image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  encoder = mtv_jax.load(tmp_path)
  pixels = np.float32(image)[None] / 255
  with torch.no_grad():
    theirs = model(parity.as_torch(pixels))
  ours = encoder.image([image])
  assert ours.pooled.shape == (1, 2 * 48)
  np.testing.assert_allclose(ours.pooled, theirs.summary, atol=1e-4)


@reference
@quiet
@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=["even", "odd"])
def test_dense_heads_of_tips_equal_transformers(
  size, tmp_path, record_property
):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  backbone = {
    **TOWER,
    "model_type": "tipsv2_vision_model",
    "num_hidden_layers": 4,
    "mlp_ratio": 2,
    "out_indices": [1, 2, 3, 4],
    "apply_layernorm": True,
    "reshape_hidden_states": False,
  }
  config = transformers.Tipsv2DptConfig(
    backbone_config=backbone,
    neck_hidden_sizes=[8, 12, 16, 20],
    fusion_hidden_size=16,
    num_depth_bins=10,
    num_labels=5,
  )
  model = transformers.Tipsv2DptForDensePrediction(config)
  model = parity.add_noise(model, scale=0.02)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "backbone" not in name:
        # As initialised, maps grow to thousands.
        parameter.mul_(0.5)
  model.save_pretrained(tmp_path)
  described = huggingface.read(tmp_path, with_params=False)
  assert described.params == {} and len(described.prediction_heads) == 3
  encoder = mtv_jax.load(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
  with torch.no_grad():
    theirs = model(parity.as_torch(np.float32(images) / 255))
  ours = {
    name: next(iter(encoder.predict(name, images, resize=False).values()))
    for name in ("metric_depth", "normals", "segmentation")
  }
  worst = parity.largest_difference(
    {
      "depth": (ours["metric_depth"], theirs.predicted_depth),
      "normals": (ours["normals"], theirs.normals.permute(0, 2, 3, 1)),
      "logits": (
        ours["segmentation"],
        theirs.segmentation_logits.permute(0, 2, 3, 1),
      ),
    }
  )
  record_property("difference", worst)
  print(f"tipsv2_dpt: {worst:.2e}")


# ---------------------------------------------------------------------------
# Perception Encoders of timm.

PE = {
  "vit_pe_core_tiny_patch16_384": {"img_size": 64},
  "vit_pe_spatial_tiny_patch16_512": {"img_size": 64},
  "vit_pe_lang_large_patch14_448": {"img_size": 56, "embed_dim": 64},
  "vit_pe_core_gigantic_patch14_448": {"img_size": 56, "embed_dim": 128},
}


def _timm(folder, name, **options):
  torch = pytest.importorskip("torch")
  timm = pytest.importorskip("timm")
  safetensors = pytest.importorskip("safetensors.torch")
  torch.manual_seed(0)
  scale = options.pop("scale", 0.1)
  model = timm.create_model(name, num_classes=0, **options)
  model = parity.add_noise(model, scale=scale)
  folder.mkdir(exist_ok=True)
  state = {k: v.contiguous() for k, v in model.state_dict().items()}
  safetensors.save_file(state, folder / "model.safetensors")
  config = {
    "architecture": name,
    "num_classes": 0,
    "pretrained_cfg": {"mean": [0.5, 0.4, 0.5], "interpolation": "bilinear"},
  }
  (folder / "config.json").write_text(json.dumps(config))
  return model


def _pe_difference(model, ours, size):
  import torch

  images = parity.pixels(2, *size)
  with torch.no_grad():
    pixels = parity.as_torch(images)
    last, taps = model.forward_intermediates(
      pixels, return_prefix_tokens=False, output_fmt="NLC"
    )
    pooled = model(pixels)
  out = parity.run_image(ours, images)
  first = ours.spec.image.prefix
  tokens = np.concatenate([out.prefix, out.patches], axis=1)
  pairs = {"pooled": (out.pooled, pooled), "last": (tokens, last)}
  for i, tap in enumerate(taps):
    pairs[f"layer {i}"] = (out.taps[i][:, first:], tap)
  return parity.largest_difference(pairs)


@reference
@quiet
@pytest.mark.parametrize("name", PE)
def test_perception_encoders_equal_timm(name, tmp_path, record_property):
  options = {**PE[name], "depth": 3, "dynamic_img_size": True}
  model = _timm(tmp_path, name, **options)
  ours = huggingface.read(tmp_path)
  side = options["img_size"]
  patch = ours.spec.image.patch_size
  worst = max(
    _pe_difference(model, ours, size)
    for size in ((side, side), (side + patch, side - patch))
  )
  record_property("difference", worst)
  print(f"{name}: {worst:.2e}")
  described = huggingface.read(tmp_path, with_params=False)
  assert described.params == {} and described.spec == ours.spec
  encoder = mtv_jax.load(tmp_path)
  assert encoder.preprocess.mean == (0.5, 0.4, 0.5)
  assert encoder.preprocess.interpolation == "bilinear"
  # The layout of queries and keys is restored by the inverse.
  rules = perception_encoder.rules(ours.spec)
  state = tensors.save(rules, native.numpy_leaves(ours.params))
  for key, value in model.state_dict().items():
    if key not in ("cls_token", "pos_embed"):
      np.testing.assert_array_equal(state[key], value.numpy(), err_msg=key)


# ---------------------------------------------------------------------------
# True shapes.


def _build_true(t, kind):
  if kind == "aimv2":
    # Large, of a third of its blocks: the whole one takes minutes on a CPU.
    config = t.Aimv2VisionConfig(num_hidden_layers=8)
    return t.Aimv2VisionModel(config), ((224, 224),)
  if kind == "radio":
    config = t.RadioConfig(
      hidden_size=768, num_hidden_layers=12, num_attention_heads=12
    )
    return t.RadioModel(config), ((224, 224), (160, 256))
  return t.Tipsv2VisionModel(t.Tipsv2VisionConfig()), ((448, 448), (224, 280))


@reference
@quiet
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aimv2", "radio", "tipsv2"])
def test_families_of_true_shapes_equal_transformers(
  kind, tmp_path, record_property
):
  model, sizes = _saved(tmp_path, kind, build=_build_true, scale=0.01)
  ours = huggingface.read(tmp_path)
  _neutralise(model)
  worst = max(
    parity.largest_difference(_pairs(model, ours, parity.pixels(1, *size)))
    for size in sizes
  )
  record_property("difference", worst)
  print(f"{kind}, true shape: {worst:.2e}")


@reference
@quiet
@pytest.mark.slow
def test_a_perception_encoder_of_true_shape_equals_timm(
  tmp_path, record_property
):
  name = "vit_pe_core_base_patch16_224"
  model = _timm(tmp_path, name, dynamic_img_size=True, scale=0.01)
  ours = huggingface.read(tmp_path)
  worst = max(
    _pe_difference(model, ours, size) for size in ((224, 224), (256, 160))
  )
  record_property("difference", worst)
  print(f"{name}: {worst:.2e}")


# ---------------------------------------------------------------------------
# Wrong folders, without transformers.


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
  """An export of each family, without our description."""
  folder = tmp_path_factory.mktemp("exports")
  preprocess = Preprocess(64).to_dict()
  for kind, fields in EXPORTED.items():
    spec = ModelSpec.from_config(fields)
    params = parity.random_params(spec)
    path = huggingface.write(
      folder / kind, ConvertedModel(spec, params, preprocess)
    )
    back = huggingface.read(path)
    assert back.spec == spec
    parity.assert_same_params(back.params, params)
    (path / "mtv_jax.json").unlink()
    assert json.loads((path / "config.json").read_text())["model_type"] == kind
  return folder


@pytest.mark.parametrize(
  ("kind", "field"),
  [
    ("aimv2_vision_model", "use_head"),
    ("siglip_vision_model", "vision_use_head"),
    ("siglip2_vision_model", "vision_use_head"),
  ],
)
def test_means_of_patches_are_exported_without_a_head(kind, field, tmp_path):
  fields = {**SPECS, "siglip_vision_model": BLOCK}[kind]
  spec = ModelSpec.from_config({**fields, "pool": "mean"})
  model = ConvertedModel(spec, parity.random_params(spec), preprocess_of(kind))
  folder = huggingface.write(tmp_path / "a", model)
  config = json.loads((folder / "config.json").read_text())
  assert config["model_type"] == kind and config[field] is False
  (folder / "mtv_jax.json").unlink()
  back = huggingface.read(folder)
  assert back.spec == spec
  parity.assert_same_params(back.params, model.params)
  # A model with texts reads them by its head.
  text = {**fields, "pool": "mean", "text": {"variant": "mu"}}
  spec = ModelSpec.from_config(text)
  model = ConvertedModel(spec, parity.random_params(spec), {"size": 64})
  with pytest.raises(ConversionError, match=r"image\.pool is 'mean'"):
    huggingface.write(tmp_path / "b", model)


@reference
@quiet
@pytest.mark.parametrize(
  ("kind", "class_name"),
  [
    ("aimv2_vision_model", "Aimv2VisionModel"),
    ("siglip_vision_model", "SiglipVisionModel"),
    ("siglip2_vision_model", "Siglip2VisionModel"),
  ],
)
def test_readmes_of_exports_without_a_head_run(
  kind, class_name, tmp_path, monkeypatch
):
  """Their embedding is the encoder's `pooled`."""
  monkeypatch.chdir(tmp_path)
  fields = {**SPECS, "siglip_vision_model": BLOCK}[kind]
  spec = ModelSpec.from_config({**fields, "pool": "mean"})
  preprocess = preprocess_of(kind)
  if "max_patches" in preprocess:
    preprocess["max_patches"] = 18  # Of an image of 4 x 4, two are padding.
  model = ConvertedModel(spec, parity.random_params(spec), preprocess)
  folder = huggingface.write(tmp_path / "a", model)
  parity.assert_loads_whole(folder, class_name)
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (64, 64, 3), np.uint8)
  PIL.Image.fromarray(image).save("photo.png")
  readme = (folder / "README.md").read_text()
  code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
  scope = {"folder": str(folder)}
  for block in code:
    exec(block.replace("photo.jpg", "photo.png"), scope)
  assert scope["features"].pooled.shape == (1, 64)
  np.testing.assert_allclose(
    scope["embedding"].numpy(), scope["features"].pooled, atol=1e-4
  )


@pytest.mark.parametrize(
  ("kind", "change", "match"),
  [
    ("aimv2_vision_model", {"qkv_bias": True}, "qkv_bias=True"),
    ("aimv2_vision_model", {"hidden_act": "gelu"}, "hidden_act.*'silu'"),
    ("aimv2_vision_model", {"use_head": False}, "unexpected.*head"),
    ("aimv2_vision_model", {"is_native": True}, "position_embedding"),
    ("aimv2_vision_model", {"rms_norm_eps": 0}, "rms_norm_eps"),
    ("radio", {"video_temporal_patch_size": 2}, "videos"),
    ("radio", {"qkv_bias": False}, "qkv_bias=False"),
    ("radio", {"num_registers": 9}, "cls_token.token"),
    ("radio", {"summary_idxs": [0, 70]}, "pool_tokens"),
    ("radio", {"max_img_size": 128}, "pos_embed"),
    ("radio", {"norm_std": [0, 1, 1]}, "norm_std"),
    ("radio", {"model_type": "radi"}, "Did you mean 'radio'"),
    ("tipsv2_vision_model", {"hidden_act": "swish"}, "hidden_act='swish'"),
    ("tipsv2_vision_model", {"num_hidden_layers": 3}, "number of layers"),
    ("tipsv2_vision_model", {"use_swiglu_ffn": True}, "mlp"),
    ("tipsv2_vision_model", {"model_type": "radio"}, "radio_model"),
  ],
)
def test_wrong_folders_are_named(exports, tmp_path, kind, change, match):
  folder = shutil.copytree(exports / kind, tmp_path / "a")
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ValueError, match=rf"(?s){match}"):
    huggingface.read(folder)


@pytest.mark.parametrize(
  ("name", "match"),
  [
    ("vit_base_patch16_224", "only Perception Encoders"),
    (3, "only Perception Encoders"),
    ("vit_pe_core_base_patch16_224", "fc1.weight.*is missing"),
  ],
)
def test_wrong_folders_of_timm_are_named(exports, tmp_path, name, match):
  folder = shutil.copytree(exports / "radio", tmp_path / "a")
  (folder / "config.json").write_text(json.dumps({"architecture": name}))
  with pytest.raises(ValueError, match=match):
    huggingface.read(folder)
