"""Exports: transformers opens them, and reading restores the model."""

import dataclasses
import json
import logging
import re

import family_specs
import jax
import library_process
import numpy as np
import PIL.Image
import pytest
import tokenizer_parity
import tokenizers
import tower_parity as parity
import trainings
from safetensors.numpy import load_file, save_file

import mtv_jax
from mtv_jax.cli.main import run_command
from mtv_jax.cli.train import train
from mtv_jax.convert import huggingface, native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.train.config import resolve
from mtv_jax.train.run import build_spec
from mtv_jax.utils.tree import flatten_with_names

TEXTS = [
  "a photo of a cat",
  "Two dogs, playing in the PARK!",
  "a_man   riding a wave",
  "",
  "the quick brown fox " * 30,
]
SQUASH = {"size": 64, "resize": "squash", "interpolation": "bilinear"}
CROP = dict(size=64, resize="shortest", resize_size=72, crop="center")
CROP |= dict(interpolation="bicubic", mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
# Two towers: MTV's, and CLIP's with both activations of released ones.
_CLIP = family_specs.TEXT_SPECS["clip"]
_QUICK = {"gelu": "quick", "norm_eps": 1e-5}
SIGLIP = {**family_specs.TEXT_SPECS["siglip"], "mask_token": True}
CLIP = {**_CLIP, **_QUICK, "text": {**_CLIP["text"], **_QUICK, "eos_id": 1}}
CASES = family_specs.exported_cases()

reference = pytest.mark.reference
# Deprecations inside transformers.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def make_model(fields, preprocess=SQUASH, tokenizer=None, *, bias=None):
  """A model of random weights; SigLIP's similarity has a bias."""
  spec = ModelSpec.from_config(fields)
  params = parity.random_params(spec)
  heads = {"dino": {"mlp": {"kernel": np.arange(6, dtype=np.float32)[None]}}}
  if spec.text is not None:
    bias = -10.0 if bias is None and spec.image.pool == "map" else bias or 0.0
    # Trained SigLIPs multiply by more than 100, differences included.
    head = {"logit_scale": 4.7, "logit_bias": bias}
    heads["contrastive"] = {k: np.float32(v) for k, v in head.items()}
  return ConvertedModel(spec, {**params, "heads": heads}, preprocess, tokenizer)


@pytest.fixture(scope="module")
def model():
  return make_model(SIGLIP, tokenizer=TokenizerFiles(None, "canonicalize"))


@pytest.fixture(scope="module")
def images():
  rng, sizes = np.random.default_rng(0), ((90, 70), (64, 140), (75, 75))
  small = rng.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
  images = map(PIL.Image.fromarray, small)
  return [np.asarray(x.resize(s)) for x, s in zip(images, sizes, strict=True)]


# ---------------------------------------------------------------------------
# Round trips.


@pytest.mark.parametrize("name", CASES)
def test_image_towers_are_restored(name, tmp_path):
  """Exact with our description; without it, except values only we store."""
  kind, fields = CASES[name]
  model = make_model(fields, family_specs.preprocess_of(kind))
  stored = model.store_positions()
  folder = huggingface.write(tmp_path / "a", model)
  config = json.loads((folder / "config.json").read_text())
  assert config["model_type"] == kind
  if "headless" in name:
    assert config.get("vision_use_head", config.get("use_head")) is False
  back = huggingface.read(folder)
  assert back.spec == stored.spec
  parity.assert_same_params(back.params, stored.params)
  (folder / "mtv_jax.json").unlink()
  (folder / "heads.safetensors").unlink()
  plain, spec = huggingface.read(folder), stored.spec.image
  added = {}
  if kind.startswith(("dino", "tips")):
    added = {"layer_scale": spec.layer_scale or 1.0, "mask_token": True}
  if kind == "dinov2_with_registers":
    added["position_resize"] = "antialiased"
  assert plain.spec.image == dataclasses.replace(spec, **added)
  got = dict(flatten_with_names(plain.params))
  for leaf, value in flatten_with_names(stored.params):
    if not leaf.startswith("heads/"):
      np.testing.assert_array_equal(got[leaf], value, err_msg=leaf)


def _with_heads(model, **scales):
  heads = {k: {"logit_scale": np.float32(v)} for k, v in scales.items()}
  params = {**model.params, "heads": {**heads, "dino": {}}}
  return dataclasses.replace(model, params=params)


def test_two_towers_are_restored(model, tmp_path):
  folder = huggingface.write(tmp_path / "a", model)
  beside = load_file(str(folder / "heads.safetensors"))
  assert set(beside) == {"heads/dino/mlp/kernel", "image/mask_token"}
  back = huggingface.read(folder)
  assert back.spec == model.spec and back.preprocess == SQUASH
  assert back.tokenizer.build().clean == "canonicalize"
  parity.assert_same_params(back.params, model.params)
  # Unchanged after a round trip through a native folder.
  again = huggingface.read(native.write(tmp_path / "b", back))
  assert again == dataclasses.replace(back, params=again.params)
  parity.assert_same_params(again.params, model.params)
  # Temperatures keep their names.
  softmax = _with_heads(model, clip=3.0)
  folder = huggingface.write(tmp_path / "a", softmax)
  tensors = load_file(str(folder / "model.safetensors"))
  assert tensors["logit_scale"].tolist() == [3.0]
  assert tensors["logit_bias"].tolist() == [0.0]
  back = dict(flatten_with_names(huggingface.read(folder).params["heads"]))
  assert back == {"clip/logit_scale": 3.0}
  with pytest.raises(ConversionError, match=r"\['a', 'b'\] of .* have one"):
    huggingface.write(tmp_path / "c", _with_heads(model, a=1, b=1))


def test_positions_of_another_size_are_stored(model):
  """The table equals the tower's computed positions; fixed ones are stored."""
  assert model.resize(64).spec == model.spec
  parity.assert_same_params(model.resize(64).params, model.params)
  fixed = make_model({**family_specs.BLOCK, "positions": "sincos"})
  for source, size in ((model, 128), (fixed, 32)):
    other = source.resize(size)
    assert other.spec.image.image_size == other.preprocess["size"] == size
    assert other.spec.image.positions == "learned"
    table = other.params["image"]["position_embedding"]
    assert table.shape == ((size // 16) ** 2, 64)
    images = parity.pixels(1, size, size)
    got, want = (parity.run_image(m, images).patches for m in (other, source))
    np.testing.assert_allclose(got, want, atol=1e-5)
  with pytest.raises(ValueError, match="100x100.*96x96"):
    model.resize(100)


def test_a_trained_neutral_parameter_is_no_longer_left_out(tmp_path):
  """A layer scale of ones that another program trained on is named."""
  model = make_model(family_specs.EXPORTED["dinov2"])
  folder = huggingface.write(tmp_path / "a", model)
  file = str(folder / "model.safetensors")
  tensors = load_file(file)
  tensors["encoder.layer.0.layer_scale1.lambda1"][:] = 2
  save_file(tensors, file)
  with pytest.raises(ConversionError, match="blocks/scale1"):
    huggingface.read(folder)


@pytest.mark.parametrize(
  ("kind", "fields"),
  [("siglip_vision_model", {}), ("dinov2", {"position_resize": "antialiased"})],
)
def test_another_size_needs_equal_resampling(kind, fields, tmp_path):
  """transformers would resample positions differently, or not at all."""
  small = {**SQUASH, "size": 32}
  model = make_model({**family_specs.EXPORTED[kind], **fields}, small)
  with pytest.raises(ConversionError, match="preprocess.size is 32.* needs 64"):
    huggingface.write(tmp_path / "a", model)


def test_writing_replaces_only_an_earlier_export(model, tmp_path):
  export = huggingface.write(tmp_path / "export", model)
  (export / "notes.txt").write_text("mine")
  plain = make_model(family_specs.TEXT_SPECS["siglip"])
  del plain.params["heads"]["dino"]
  huggingface.write(export, plain)
  # Old heads or an old tokenizer would be read with the new weights.
  names = {p.name for p in export.iterdir()}
  assert not names & {"heads.safetensors", "tokenizer.json"}
  assert "notes.txt" in names
  other = tmp_path / "other"
  other.mkdir()
  (other / "thesis.tex").write_text("mine")
  with pytest.raises(ConversionError, match=r"not empty.*thesis\.tex"):
    huggingface.write(other, model)


@pytest.fixture(scope="module")
def small_tokenizers(tmp_path_factory):
  """Files of tokenizers whose vocabularies fit the model, by kind."""
  folder = tmp_path_factory.mktemp("tokenizers")
  text = "a photo of cat two dogs playing in the park Red dog quick"
  ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
  path = folder / "small.model"
  tokenizer_parity.train_sentencepiece(path, vocab_size=120, **ids)
  names = ["<pad>", "</s>", "<unk>", *text.split()]
  model = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, "<unk>")
  )
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  model.save(str(folder / "tokenizer.json"))
  return {
    "bytes": None,
    "sentencepiece": path,
    "json": folder / "tokenizer.json",
  }


@pytest.mark.parametrize("clean", ["none", "lower", "canonicalize"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "json"])
def test_an_export_keeps_the_cleaning(
  model, small_tokenizers, tmp_path, kind, clean
):
  files = TokenizerFiles(small_tokenizers[kind], clean)
  texts = [*TEXTS, "A Red dog_."]
  want = files.build().encode(texts, 12)
  model = dataclasses.replace(model, tokenizer=files)
  folder = huggingface.write(tmp_path / "a", model)
  # Also of an export of the export, and without the file that is only ours.
  again = huggingface.write(tmp_path / "b", huggingface.read(folder))
  for path in (folder, again):
    for _ in range(2):
      back = huggingface.read(path).tokenizer
      assert back.clean == clean
      np.testing.assert_array_equal(back.build().encode(texts, 12), want)
      (path / "mtv_jax.json").unlink(missing_ok=True)


# ---------------------------------------------------------------------------
# transformers opens an export.


def open_quietly(folder, class_name, caplog, *, processor="AutoProcessor"):
  """transformers' model and processor, which log nothing."""
  transformers = pytest.importorskip("transformers")
  # This class's default token ids are outside its vocabulary, and
  # transformers 5 warns of it once for any SigLIP.
  transformers.SiglipTextConfig()
  caplog.clear()  # Where CI is set, transformers' logger propagates.
  root = logging.getLogger("transformers")
  root.addHandler(caplog.handler)
  try:
    model = library_process.load_model(folder, class_name)
    kind = getattr(transformers, processor)
    processor = kind.from_pretrained(folder, backend="pil")
  finally:
    root.removeHandler(caplog.handler)
  assert [r.getMessage() for r in caplog.records] == []
  return model, processor


def load_on_one_device(folder):
  """The tests' eight devices would each store a copy of a large model."""
  return mtv_jax.load(folder, mesh=make_mesh({"data": 1}, jax.devices()[:1]))


def process(processor, encoder, images, **options):
  """The processor's tensors; the pixels are the encoder's."""
  inputs = processor(
    images=[PIL.Image.fromarray(image) for image in images],
    return_tensors="pt",
    **options,
  )
  pixels = np.stack([encoder.preprocess(image) for image in images])
  theirs = inputs["pixel_values"].numpy().transpose(0, 2, 3, 1)
  np.testing.assert_array_equal(pixels, theirs)
  return inputs, pixels


def assert_equal_logits(folder, model, processor, images):
  """Pixels, ids and logits are the encoder's."""
  import torch

  encoder = load_on_one_device(folder)
  options = dict(text=TEXTS, padding="max_length", truncation=True)
  inputs, _ = process(processor, encoder, images, **options)
  # The text tower was trained without a mask over the padding.
  assert set(inputs) == {"pixel_values", "input_ids"}
  with torch.no_grad():
    expected = model(**inputs).logits_per_image.numpy()
  ids = encoder.tokenizer.encode(TEXTS, encoder.spec.text.length)
  np.testing.assert_array_equal(ids, inputs["input_ids"].numpy())
  pooled = encoder.image(images, outputs=("pooled",), batch_size=8).pooled
  logits = encoder.similarity(pooled, encoder.text(TEXTS))
  # Random towers give nearly equal logits; they must not all be equal.
  assert np.ptp(expected) > 1e-3
  np.testing.assert_allclose(logits, expected, atol=parity.TOLERANCE)


@reference
@quiet
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "json"])
@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_transformers_opens_two_towers(
  name, kind, small_tokenizers, images, tmp_path, caplog
):
  files = TokenizerFiles(small_tokenizers[kind], "canonicalize")
  fields, class_name, preprocess = SIGLIP, "SiglipModel", SQUASH
  if name == "clip":
    # Covers both released activations.
    fields = _CLIP if kind == "bytes" else CLIP
    class_name, preprocess = "CLIPModel", CROP if kind == "json" else SQUASH
  model = make_model(fields, preprocess, files)
  folder = huggingface.write(tmp_path / "a", model)
  opened, processor = open_quietly(folder, class_name, caplog)
  assert_equal_logits(folder, opened, processor, images)
  tokenizer, text = processor.tokenizer, opened.config.text_config
  for token in ("bos", "eos", "pad"):
    value = getattr(text, f"{token}_token_id")
    assert value is None or 0 <= value < text.vocab_size, token
  assert text.eos_token_id == tokenizer.eos_token_id == files.build().eos_id


@reference
@quiet
def test_transformers_has_the_features_of_a_run_with_mup(tmp_path):
  """muP's multipliers are in the weights: the class's own forward is enough.

  Twice the base's channels a head in one tower, twice its heads in the other.
  """
  import torch

  config = trainings.smallest("steps=2,save=2", evals={})
  mup = dict(base_width=32, base_depth=1, base_heads=2)
  for tower, heads in ((config.model, 2), (config.model.text, 4)):
    tower.update(width=64, depth=2, heads=heads, mlp_dim=128, mup=mup)
  params = jax.device_get(train(config, tmp_path / "run").params)
  args = ["to_hf", str(tmp_path / "run"), str(tmp_path / "hf")]
  run_command("convert", args)
  opened = library_process.load_model(tmp_path / "hf", "SiglipModel")

  spec = build_spec(resolve(config), 80)
  queries = spec.mup_multipliers["image/blocks/attention/qkv/kernel"]
  np.testing.assert_allclose(np.unique(queries.rate), [0.5**0.5, 1])
  image = parity.pixels(2, 16, 16)
  ids = np.random.default_rng(0).integers(2, 258, (2, 16))
  with torch.no_grad():
    theirs = {
      "image": opened.vision_model(parity.as_torch(image)),
      "text": opened.text_model(torch.from_numpy(ids)),
    }
  towers = {encoding.tower: tower for encoding, tower in spec.towers.items()}
  ours = {  # As the training step runs them.
    name: towers[name].apply(*jax.tree.map(jax.numpy.asarray, args))
    for name, *args in (
      ("image", {"params": params["image"]}, image),
      ("text", {"params": params["text"]}, ids),
    )
  }
  pairs = {k: (ours[k].pooled, theirs[k].pooler_output) for k in ours}
  assert parity.largest_difference(pairs) < 1e-5


@reference
@quiet
@pytest.mark.parametrize("name", [n for n in CASES if "siglip2" not in n])
def test_transformers_opens_image_towers(name, images, tmp_path, caplog):
  """Pixels, all layers and the embedding are the encoder's."""
  import torch

  kind, fields = CASES[name]
  crops = kind.startswith("dino") and name not in ("dinov2", "dinov3_vit")
  # These classes take images of other sizes than the model's 64 pixels.
  preprocess = {**CROP, "size": 48} if crops else SQUASH
  if kind == "dinov2_with_registers":
    fields = {**fields, "position_resize": "antialiased"}
  folder = huggingface.write(tmp_path / "a", make_model(fields, preprocess))
  config = json.loads((folder / "config.json").read_text())
  opened, processor = open_quietly(
    folder, config["architectures"][0], caplog, processor="AutoImageProcessor"
  )
  encoder = load_on_one_device(folder)
  inputs, pixels = process(processor, encoder, images)
  with torch.no_grad():
    expected = opened(
      pixel_values=inputs["pixel_values"], output_hidden_states=True
    )
  embedding = encoder.image(images).pooled
  if kind == "radio":
    parity.largest_difference({"embedding": (embedding, expected.summary)})
    return
  pairs = parity.image_pairs(
    parity.run_image(huggingface.read(folder), pixels), expected
  )
  pooled = expected.pooler_output
  if pooled is None:
    pooled = expected.last_hidden_state.mean(1)
  parity.largest_difference({**pairs, "embedding": (embedding, pooled)})


@reference
@quiet
@pytest.mark.parametrize(
  "name", ["siglip", "dinov3_vit", *(n for n in CASES if "less" in n)]
)
def test_the_readme_runs(name, images, tmp_path, monkeypatch):
  """Its embedding is the encoder's `pooled`."""
  pytest.importorskip("transformers")
  if name == "siglip":
    model = make_model(SIGLIP, tokenizer=TokenizerFiles(None, "lower"))
  else:
    kind, fields = CASES[name]
    if kind == "dinov3_vit":  # Its class pools by the CLS token.
      fields = {**fields, "pool": "mean", "cls_token": True}
    preprocess = family_specs.preprocess_of(kind)
    if "max_patches" in preprocess:
      preprocess["max_patches"] = 18  # For 4 x 4 patches, two are padding.
    model = make_model(fields, preprocess)
  folder = huggingface.write(tmp_path / "a", model)
  monkeypatch.chdir(folder)
  PIL.Image.fromarray(images[2][:64, :64]).save("photo.png")
  readme = (folder / "README.md").read_text()
  blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
  assert len(blocks) == 2
  scope = {}
  for block in blocks:
    exec(block.replace("photo.jpg", "photo.png"), scope)
  assert scope["features"].pooled.shape == (1, 64)
  if name == "siglip":
    assert tuple(scope["logits"].shape) == (1, 2)
    return
  np.testing.assert_allclose(
    scope["embedding"].numpy(), scope["features"].pooled, atol=1e-4
  )


@pytest.fixture(scope="module")
def photos(shared_data):
  files = sorted((shared_data / "coco" / "val2017").glob("*.jpg"))[:8]
  assert len(files) == 8
  return [np.asarray(PIL.Image.open(f).convert("RGB")) for f in files]


@reference
@quiet
@pytest.mark.slow
@pytest.mark.parametrize("depth", [3, pytest.param(12, marks=pytest.mark.long)])
def test_logits_on_real_photos(photos, shared_data, tmp_path, caplog, depth):
  """The widths of MTV's smaller model, with a SentencePiece vocabulary."""
  piece = shared_data / "tokenizers" / "t5_cc_all_32000.spiece.model"
  files = TokenizerFiles(piece, "canonicalize")
  size = files.build().vocab_size
  text = {"variant": "B", "depth": depth, "vocab_size": size, "length": 64}
  preprocess = {**SQUASH, "size": 224, "interpolation": "bicubic"}
  fields = {"variant": "B/16", "depth": depth, "text": text}
  model = make_model(fields, preprocess, files)
  folder = huggingface.write(tmp_path / "export", model)
  opened, processor = open_quietly(folder, "SiglipModel", caplog)
  assert_equal_logits(folder, opened, processor, photos)


@reference
@quiet
def test_torchvision_pixels_are_near(model, photos, tmp_path):
  """transformers' default processor, if torchvision is installed."""
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torchvision")
  processor = transformers.AutoImageProcessor.from_pretrained(
    huggingface.write(tmp_path / "a", model), backend="torchvision"
  )
  images = [PIL.Image.fromarray(photo) for photo in photos]
  theirs = processor(images=images, return_tensors="np")["pixel_values"]
  ours = np.stack(list(map(Preprocess.from_dict(SQUASH), photos)))
  difference = np.abs(np.moveaxis(np.asarray(theirs), 1, -1) - ours)
  # It rounds once and Pillow twice: a few pixels differ by one level.
  assert difference.max() <= 1.01 / 127.5
  assert (difference > 1e-4).mean() < 0.03
