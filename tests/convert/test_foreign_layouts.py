"""Other publishers' files: ViT's relatives, open_clip, timm."""

import contextlib
import json
import re

import library_process
import numpy as np
import PIL.Image
import pytest
import tokenizers
import tower_parity as parity
from family_specs import TEXT_SPECS

from mtv_jax.cli.main import run_command
from mtv_jax.convert import huggingface
from mtv_jax.convert import timm as timm_reader
from mtv_jax.convert.open_clip import OpenClip
from mtv_jax.convert.tables import ConversionError
from mtv_jax.encoder import loading
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models.two_tower import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOWER = parity.tower(48, 2, 4, 96, image_size=64, patch_size=16)
VITS = {
  "ViTModel": "Dinov2Model",
  "ViTMAEForPreTraining": "Dinov2Model",
  "DeiTModel": "Dinov2WithRegistersModel",
  "IJepaModel": "SiglipVisionModel",
}
SMALL_DECODER = parity.tower(32, 1, 2, 32)
SMALL_DECODER = {f"decoder_{k}": v for k, v in SMALL_DECODER.items()}


@pytest.mark.reference
@pytest.mark.parametrize("class_name", VITS)
def test_vits_equal_transformers_and_are_exported(class_name, tmp_path):
  import torch

  is_mae = "MAE" in class_name
  options = {**TOWER, **(SMALL_DECODER if is_mae else {})}
  # With masks, ViT-MAE shuffles the patches.
  options |= {"mask_ratio": 0.0} if is_mae else {}
  model = parity.save_model(tmp_path / "a", class_name, **options)
  ours = huggingface.read(tmp_path / "a")
  images = parity.pixels(2, 64, 64)
  order = {"noise": torch.arange(16.0).repeat(2, 1)} if is_mae else {}
  with torch.no_grad():
    theirs = getattr(model, "vit", model)(
      parity.as_torch(images), output_hidden_states=True, **order
    )
  last = theirs.last_hidden_state
  theirs.pooler_output = last.mean(1) if "IJepa" in class_name else last[:, 0]
  out = parity.run_image(ours, images)
  parity.largest_difference(parity.image_pairs(out, theirs))
  folder = huggingface.write(tmp_path / "b", ours)
  opened = library_process.load_model(folder, VITS[class_name])
  with torch.no_grad():
    again = opened(parity.as_torch(images)).last_hidden_state
  parity.largest_difference({"last": (again, last)})
  back = huggingface.read(folder)
  assert back.spec == ours.spec
  parity.assert_same_params(back.params, ours.params)


# ---------------------------------------------------------------------------
# timm's wrapper and transform.


@pytest.mark.reference
@pytest.mark.parametrize(
  ("mode", "name", "pool"),
  [
    ("center", "vit_tiny_patch16_224", "cls"),
    ("squash", "eva02_tiny_patch14_224", "mean"),
  ],
)
def test_timm_wrappers_equal_timm(mode, name, pool, tmp_path):
  timm = pytest.importorskip("timm")
  import transformers

  pretrained = {
    "input_size": (3, 112, 112), "crop_pct": 0.9, "crop_mode": mode,
    "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.25,) * 3,
  }  # fmt: skip
  config = transformers.TimmWrapperConfig(
    architecture=name,
    model_args={"img_size": 112, "depth": 2, "embed_dim": 48},
    pretrained_cfg=pretrained,
    num_classes=0,
  )
  model = transformers.TimmWrapperModel(config)
  model.save_pretrained(tmp_path)
  ours = huggingface.read(tmp_path)
  assert ours.spec.image.heads == 3 and ours.spec.image.pool == pool
  again = transformers.TimmWrapperModel.from_pretrained(tmp_path)
  again.save_pretrained(tmp_path / "a")  # Without "timm_model.".
  back = huggingface.read(tmp_path / "a")
  parity.assert_same_params(back.params, ours.params)
  got = ours.params["image"]["blocks"]["mlp"]["fc2"]["kernel"][1]
  want = model.timm_model.blocks[1].mlp.fc2.weight.detach().numpy()
  np.testing.assert_array_equal(got, want.T)
  noise = np.random.default_rng(0).integers(0, 256, (90, 131, 3), np.uint8)
  image = PIL.Image.fromarray(noise)
  transform = timm.data.create_transform(**pretrained, is_training=False)
  pixels = Preprocess.from_dict(ours.preprocess)(noise).transpose(2, 0, 1)
  np.testing.assert_allclose(pixels, transform(image).numpy(), atol=1e-6)


@pytest.mark.long
@pytest.mark.reference
def test_all_architectures_of_timm_have_their_sizes():
  """What shapes don't show, of every architecture, and which have no export."""
  timm = pytest.importorskip("timm")
  import torch

  class Shapes(dict):
    path = ""
    names = property(lambda self: [*self])

    def shape(self, name):
      return tuple(self[name].shape)

    read = shape

  only_read = re.compile(
    r"eva(02)?_.*|vit_(betwixt|little|mediumd?|so150m2?|wee)_.*(gap|map)_.*|"
    r"vit_base_patch16_(224_miil|reg4_gap_256)|vit_(giant|gigantic)_patch14_224|"
    r"vit_intern300m_.*|vit_so400m_patch14_reg1_tipsv2"
  )
  kinds = {"GELU": "exact", "GELUTanh": "tanh", "QuickGELU": "quick"}
  pools = {"token": "cls", "avg": "mean", "map": "map"}
  count = 0
  for name in timm.list_models(["vit*", "deit*", "aimv2*", "eva*", "flexi*"]):
    with torch.device("meta"):
      model = timm.create_model(name, num_classes=0)
    store = Shapes(model.state_dict())
    try:
      spec = timm_reader.read_spec({"architecture": name}, store)
    except ConversionError:
      continue
    block, count = model.blocks[0], count + 1
    exporter = contextlib.nullcontext()
    if only_read.fullmatch(name):
      exporter = pytest.raises(ConversionError, match="can't express")
    with exporter:
      huggingface.find_exporter(ModelSpec(image=spec))
    assert spec.heads == block.attn.num_heads, name
    assert spec.norm_eps == block.norm1.eps, name
    assert spec.pool == pools[model.global_pool], name
    if spec.mlp == "plain":
      assert spec.gelu == kinds[type(block.mlp.act).__name__], name
  print(f"{count} architectures")
  assert count > 180


# ---------------------------------------------------------------------------
# open_clip.

VISION = {"layers": 2, "width": 48, "head_width": 12, "image_size": 64}
TEXT = {"context_length": 12, "vocab_size": 99, "width": 32, "layers": 2}
TEXT |= {"heads": 2, "mlp_ratio": 2.0}
OPEN_CLIP = {
  "openai": {  # Six pixels fill no patch.
    "quick_gelu": True, "vision_cfg": {**VISION, "image_size": 70},
    "text_cfg": TEXT,
  },
  "sigmoid": {
    "init_logit_bias": -10.0,
    "custom_text": True,
    "vision_cfg": {**VISION, "mlp_ratio": 2.5, "pool_type": "avg"}
    | {"norm_kwargs": {"eps": 1e-6}, "ls_init_value": 0.1},
    "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"}
    | {"proj_bias": True, "act_kwargs": {"approximate": "tanh"}},
  },
  "timm": {
    "custom_text": True,
    "vision_cfg": {
      "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg",
      "image_size": 224,
    },
    "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 5},
  },
  "pe_core": {
    "custom_text": True,
    "vision_cfg": {
      "timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map",
      "timm_proj": None, "image_size": 384,
    },
    "text_cfg": TEXT,
  },
}  # fmt: skip


def save_open_clip(folder, config):
  """Saves a model of open_clip of random weights, and returns it."""
  open_clip = pytest.importorskip("open_clip")
  import torch

  fields = {k: v for k, v in config.items() if k != "custom_text"}
  build = (
    open_clip.CustomTextCLIP if "custom_text" in config else open_clip.CLIP
  )
  torch.manual_seed(0)
  model = parity.add_noise(build(**fields), scale=0.05)
  preprocess = {"resize_mode": "squash", "mean": [0.1, 0.2, 0.3]}
  content = {"model_cfg": config, "preprocess_cfg": preprocess}
  (folder / "open_clip_config.json").write_text(json.dumps(content))
  torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
  return model


def open_clip_features(model, size):
  """Images, tokens, and their embeddings by open_clip."""
  import torch

  images = parity.pixels(2, size, size)
  tokens = np.random.default_rng(2).integers(6, 98, (2, 12)).astype(np.int32)
  tokens[[0, 1], [4, 9]] = 5
  with torch.no_grad():
    image = model.encode_image(parity.as_torch(images))
    text = model.encode_text(torch.from_numpy(tokens).long())
  return images, tokens, image, text


def assert_equal_open_clip(ours, model, size):
  images, tokens, image, text = open_clip_features(model, size)
  out = parity.run_text(ours, tokens)
  pairs = {"text": (out.pooled, text)}
  side = ours.spec.image.image_size
  images = images[:, :side, :side]
  pairs["image"] = (parity.run_image(ours, images).pooled, image)
  parity.largest_difference(pairs)


@pytest.mark.reference
@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_open_clip_is_read_and_written(kind, tmp_path):
  open_clip = pytest.importorskip("open_clip")
  import torch

  config, folder = {"embed_dim": 40, **OPEN_CLIP[kind]}, tmp_path / "a"
  folder.mkdir()
  model = save_open_clip(folder, config)
  state, file = model.state_dict(), folder / "open_clip_pytorch_model.bin"
  if kind == "timm":
    torch.save({**state, "visual.head.mlp.fc1.bias": torch.ones(2)}, file)
    with pytest.raises(ConversionError, match=r"head\.mlp\.fc1\.bias"):
      huggingface.read(folder)
  if kind == "pe_core":  # The tower's projection lacks a bias.
    torch.save(state, file)
    with pytest.raises(ConversionError, match=r"trunk\.head"):
      huggingface.read(folder)
    state["visual.trunk.head.bias"].zero_()
  torch.save(state, file)
  ours = huggingface.read(folder)
  assert ours.preprocess["resize"] == "squash"
  assert ours.preprocess["mean"] == (0.1, 0.2, 0.3)
  size = ours.preprocess["size"] + ours.preprocess.get("drop", 0)
  assert_equal_open_clip(ours, model, size)
  loss, _ = huggingface.read_contrastive(folder)
  assert loss == ("sigmoid" if kind == "sigmoid" else "softmax")
  if "timm_model_name" in config["vision_cfg"]:
    return
  written = huggingface.write_open_clip(tmp_path / "b", ours)
  for has_info in (True, False):
    back = huggingface.read(written)
    assert back.spec == ours.spec
    got, want = (Preprocess.from_dict(m.preprocess) for m in (back, ours))
    assert got == want
    parity.assert_same_params(back.params, ours.params)
    if has_info:
      (written / "mtv_jax.json").unlink()
  name = f"local-dir:{written}"
  opened, transform = open_clip.create_model_from_pretrained(name)
  assert_equal_open_clip(ours, opened.eval(), size)
  noise = np.random.default_rng(0).integers(0, 256, (90, 131, 3), np.uint8)
  pixels = transform(PIL.Image.fromarray(noise)).numpy().transpose(1, 2, 0)
  got = Preprocess.from_dict(ours.preprocess)(noise)
  np.testing.assert_allclose(got, pixels[: len(got), : len(got)], atol=1e-6)


@pytest.mark.reference
def test_texts_of_open_clip_are_cleaned_as_by_open_clip(tmp_path):
  open_clip = pytest.importorskip("open_clip")
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0}, "</s>"))
  model.save(str(tmp_path / "tokenizer.json"))
  hub, text = {"hf_tokenizer_name": "a/b"}, "A caf\u00c3\u00a9 &amp;amp;\n bar"
  lower = open_clip.tokenizer.get_clean_fn("lower")(text)
  for fields, expected in (
    ({}, lower),
    (hub | {"tokenizer_kwargs": {"clean": "lower"}}, lower),
    (hub, text),  # By default, open_clip repairs it and keeps capitals.
  ):
    config = {**OPEN_CLIP["openai"], "embed_dim": 40, "text_cfg": TEXT | fields}
    content = json.dumps({"model_cfg": config})
    (tmp_path / "open_clip_config.json").write_text(content)
    ours = OpenClip().read_tokenizer(tmp_path).build()
    assert ours.clean_text(text) == expected


def test_clip_leaves_to_open_clip_and_siglip_is_refused(tmp_path, caplog):
  fields = dict(TEXT_SPECS["clip"], image_size=64)
  model = parity.spec_model(fields)
  model.preprocess["rounding"] = "torchvision"
  folder = huggingface.write_open_clip(tmp_path / "a", model)
  assert not loading.is_run(folder)
  back = huggingface.read(folder)
  parity.assert_same_params(back.params, model.params)
  options = ["--license=mit", "--data=x", "--dry_run"]
  run_command("push", [str(folder), "lab/new", *options])
  assert '"hf-hub:lab/new"' in (folder / "README.md").read_text()
  # An image tower's weights do not replace the model's.
  (folder / "open_clip_model.safetensors").rename(folder / "model.safetensors")
  with pytest.raises(ConversionError, match=r"lacks open_clip_model\."):
    huggingface.read(folder)
  assert "open_clip antialiases or rounds differently" in caplog.text
  with pytest.raises(
    ConversionError,
    match="(?s)open_clip's CLIP.*pool is.*to_hf, as SiglipModel",
  ):
    huggingface.write_open_clip(
      tmp_path / "b", parity.spec_model(TEXT_SPECS["siglip"])
    )
