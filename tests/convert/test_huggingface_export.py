"""Exports: transformers opens them, and reading restores the model."""

import dataclasses
import logging
import re
import warnings

import jax
import numpy as np
import PIL.Image
import pytest
import sentencepiece
import tokenizers
from safetensors.numpy import load_file

from mtv_jax.convert import huggingface, native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.convert.tables import ConversionError
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import two_tower as models
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

TOLERANCE = 1e-4
TEXTS = [
  "a photo of a cat",
  "Two dogs, playing in the PARK!",
  "a_man   riding a wave",
  "",
  "the quick brown fox " * 30,
]
SMALL = {
  "variant": "mu/16",
  "image_size": 64,
  "mask_token": True,
  "text": {"variant": "mu", "depth": 1, "length": 16, "vocab_size": 258},
}
PREPROCESS = {"size": 64, "resize": "squash", "interpolation": "bilinear"}

reference = pytest.mark.reference
# Deprecations inside transformers.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _flat(tree):
  return dict(flatten_with_names(tree))


def _params(spec, *, seed=0, bias=-10.0):
  """Random parameters of a spec, none of them zero or one."""
  rng = np.random.default_rng(seed)
  leaves = {}
  for name, leaf in _flat(models.abstract_params(spec)).items():
    scale = 0.02 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
    value = rng.normal(size=leaf.shape).astype(np.float32) * np.float32(scale)
    leaves[name] = value + ("scale" in name)
  if spec.text is not None:
    head = "heads/contrastive"
    # Trained SigLIPs multiply by more than 100, differences included.
    leaves[f"{head}/logit_scale"] = np.float32(4.7)
    leaves[f"{head}/logit_bias"] = np.float32(bias)
  return unflatten_names(leaves)


def _images(count, *, seed=0):
  rng = np.random.default_rng(seed)
  images = []
  for _ in range(count):
    h, w = (int(n) for n in rng.integers(50, 150, 2))
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    images.append(np.asarray(PIL.Image.fromarray(small).resize((w, h))))
  return images


@pytest.fixture(scope="module")
def photos(shared_data):
  files = sorted((shared_data / "coco" / "val2017").glob("*.jpg"))[:16]
  assert len(files) == 16
  return [np.asarray(PIL.Image.open(f).convert("RGB")) for f in files]


@pytest.fixture(scope="module")
def spec():
  return ModelSpec.from_config(SMALL)


@pytest.fixture(scope="module")
def params(spec):
  return _params(spec)


@pytest.fixture
def export(spec, params, tmp_path):
  tokenizer = TokenizerFiles(None, "lower")
  model = ConvertedModel(spec, params, PREPROCESS, tokenizer)
  return huggingface.write(tmp_path / "export", model)


def _assert_same(got, want):
  got, want = _flat(got), _flat(want)
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name].dtype == np.float32
    np.testing.assert_array_equal(got[name], value, err_msg=name)


# ---------------------------------------------------------------------------
# Round trips.


def test_fixed_positions_are_exported_as_stored_ones(tmp_path):
  fixed = ModelSpec.from_config({**SMALL, "positions": "sincos", "text": None})
  params = _params(fixed)
  preprocess = {**PREPROCESS, "size": 64}
  model = ConvertedModel(fixed, params, preprocess)
  restored = huggingface.read(huggingface.write(tmp_path / "export", model))
  assert restored.spec.image.positions == "learned"
  native.write(tmp_path / "native", model)
  assert huggingface.read(tmp_path / "native").spec == fixed
  images = np.random.default_rng(0).normal(size=(1, 64, 64, 3))

  def run(model, images):
    run = jax.jit(models.image_tower(model.spec).apply)
    return run({"params": model.params["image"]}, images).pooled

  images = jax.numpy.asarray(images, np.float32)
  np.testing.assert_array_equal(run(restored, images), run(model, images))
  # Another resolution: resampled as the tower does it.
  small = model.resize(32)
  assert small.spec.image.positions == "learned"
  np.testing.assert_allclose(
    run(small, images[:, :32, :32]), run(model, images[:, :32, :32]), atol=1e-5
  )


def test_round_trip_is_identical(spec, params, tmp_path):
  heads = {
    **params["heads"],
    "dino": {"mlp": {"kernel": np.arange(6.0, dtype=np.float32)[None]}},
    "grounding": {"logit_scale": np.float32(1.5)},
  }
  params = {**params, "heads": heads}
  tokenizer = TokenizerFiles(None, "canonicalize")
  model = ConvertedModel(spec, params, PREPROCESS, tokenizer)
  folder = huggingface.write(tmp_path / "a", model)
  beside = load_file(str(folder / "heads.safetensors"))
  assert set(beside) == {
    "heads/dino/mlp/kernel",
    "heads/grounding/logit_scale",
    "image/mask_token",
  }
  back = huggingface.read(folder)
  assert back.spec == spec
  assert back.preprocess == PREPROCESS
  assert back.tokenizer.build().clean == "canonicalize"
  _assert_same(back.params, params)

  # The same after a round trip through a native folder.
  again = huggingface.read(native.write(tmp_path / "b", back))
  assert again == dataclasses.replace(back, params=again.params)
  _assert_same(again.params, params)


def test_a_softmax_head_under_its_own_name(spec, params, tmp_path):
  heads = {"clip": {"logit_scale": np.float32(3.0)}, "dino": {}}
  model = ConvertedModel(spec, {**params, "heads": heads}, PREPROCESS)
  folder = huggingface.write(tmp_path / "a", model)
  tensors = load_file(str(folder / "model.safetensors"))
  assert tensors["logit_scale"].tolist() == [3.0]
  assert tensors["logit_bias"].tolist() == [0.0]
  back = huggingface.read(folder)
  assert _flat(back.params["heads"]) == {"clip/logit_scale": 3.0}


def test_two_temperatures_need_a_name(spec, params, tmp_path):
  heads = {n: {"logit_scale": np.float32(1)} for n in ("a", "b")}
  with pytest.raises(ConversionError, match=r"'a', 'b'.*'contrastive'"):
    huggingface.write(
      tmp_path / "a",
      ConvertedModel(spec, {**params, "heads": heads}, PREPROCESS),
    )


def test_resampled_positions(spec, params):
  model = ConvertedModel(spec, params, PREPROCESS)
  same = model.resize(64)
  assert same.spec == spec
  _assert_same(same.params, params)
  larger = model.resize(128)
  assert larger.spec.image.image_size == larger.preprocess["size"] == 128
  table = larger.params["image"]["position_embedding"]
  assert table.shape == (64, 64)
  # The stored table is the one that the tower computes on the fly.
  images = jax.numpy.asarray(
    np.random.default_rng(0).normal(size=(1, 128, 128, 3)), np.float32
  )

  def run(spec, params):
    tower = models.image_tower(spec)
    apply = jax.jit(lambda p: tower.apply({"params": p}, images))
    return apply(jax.tree.map(jax.numpy.asarray, params["image"]))

  np.testing.assert_allclose(
    run(larger.spec, larger.params).patches,
    run(spec, params).patches,
    atol=1e-5,
  )
  with pytest.raises(ValueError, match="100x100.*96x96"):
    model.resize(100)


# ---------------------------------------------------------------------------
# transformers opens an export.


def _theirs(folder, images, texts):
  """(pixels, ids, logits) of AutoProcessor and AutoModel."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model, info = transformers.AutoModel.from_pretrained(
    folder, output_loading_info=True
  )
  assert type(model).__name__ in ("SiglipModel", "CLIPModel")
  assert not any(info.values()), info
  processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
  inputs = processor(
    images=[PIL.Image.fromarray(i) for i in images],
    text=texts,
    padding="max_length",
    truncation=True,
    return_tensors="pt",
  )
  # A mask over the padding would change what the text tower was trained on.
  assert set(inputs) == {"pixel_values", "input_ids"}
  with torch.no_grad():
    logits = model.eval()(**inputs).logits_per_image.numpy()
  pixels = inputs["pixel_values"].numpy().transpose(0, 2, 3, 1)
  return pixels, inputs["input_ids"].numpy(), logits


def _assert_equal_logits(folder, images, texts):
  """Returns the largest difference of the logits."""
  pixels, ids, expected = _theirs(folder, images, texts)
  back = huggingface.read(folder)
  preprocess = Preprocess.from_dict(back.preprocess)
  tokenizer = back.tokenizer.build()
  ours = np.stack([preprocess(image) for image in images])
  np.testing.assert_array_equal(ours, pixels)
  np.testing.assert_array_equal(
    tokenizer.encode(texts, back.spec.text.length), ids
  )
  # One device: the tests' eight would each store a copy of a large model.
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  encoder = Encoder(back.spec, back.params, preprocess, tokenizer, mesh)
  pooled = encoder.image(images, outputs=("pooled",), batch_size=8).pooled
  logits = encoder.similarity(pooled, encoder.text(texts))
  # Random towers give nearly equal logits; they must not be all the same.
  assert np.ptp(expected) > 1e-3
  difference = float(np.abs(logits - expected).max())
  assert difference <= TOLERANCE
  return difference


@reference
@quiet
def test_transformers_opens_the_export(export):
  _assert_equal_logits(export, _images(3), TEXTS)


# CLIP's architecture, shrunk.
CLIP = {
  **SMALL,
  "pool": "cls",
  "pre_norm": True,
  "patch_bias": False,
  "gelu": "quick",
  "norm_eps": 1e-5,
  "projection": 48,
  "text": {
    **SMALL["text"],
    "pool": "eos",
    "eos_id": 1,
    "causal": True,
    "gelu": "quick",
    "norm_eps": 1e-5,
    "projection_bias": False,
  },
}
CROP = {
  "size": 64,
  "resize": "shortest",
  "resize_size": 72,
  "crop": "center",
  "interpolation": "bicubic",
  "mean": [0.48, 0.46, 0.41],
  "std": [0.27, 0.26, 0.28],
}


@pytest.mark.parametrize("clean", ["none", "lower", "canonicalize"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "json"])
def test_an_export_keeps_the_cleaning(
  spec, params, small_tokenizers, tmp_path, kind, clean
):
  files = TokenizerFiles(small_tokenizers[kind], clean)
  model = ConvertedModel(spec, params, PREPROCESS, files)
  folder = huggingface.write(tmp_path / "a", model)
  want = files.build().encode([*TEXTS, "A Red dog_."], 16)
  back = huggingface.read(folder).tokenizer
  assert back.clean == clean
  np.testing.assert_array_equal(
    back.build().encode([*TEXTS, "A Red dog_."], 16), want
  )
  # Also of an export of the export, and without the file that is only ours.
  again = huggingface.write(tmp_path / "b", huggingface.read(folder))
  for path in (folder, again):
    (path / "mtv_jax.json").unlink()
    back = huggingface.read(path).tokenizer
    assert back.clean == clean
    np.testing.assert_array_equal(
      back.build().encode([*TEXTS, "A Red dog_."], 16), want
    )


@pytest.fixture(scope="module")
def small_tokenizers(tmp_path_factory):
  """Files of tokenizers whose vocabularies fit the model, by kind."""
  folder = tmp_path_factory.mktemp("tokenizers")
  text = "a photo of cat two dogs playing in the park Red dog quick"
  (folder / "text").write_text("\n".join([text] * 20))
  sentencepiece.SentencePieceTrainer.train(
    input=str(folder / "text"),
    model_prefix=str(folder / "small"),
    vocab_size=40,
    hard_vocab_limit=False,
    minloglevel=2,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
  )
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
    "sentencepiece": folder / "small.model",
    "json": folder / "tokenizer.json",
  }


@reference
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "json"])
@pytest.mark.parametrize("config", [SMALL, CLIP], ids=["siglip", "clip"])
def test_transformers_opens_the_export_without_a_warning(
  small_tokenizers, tmp_path, caplog, config, kind
):
  transformers = pytest.importorskip("transformers")
  files = TokenizerFiles(small_tokenizers[kind], "canonicalize")
  spec = ModelSpec.from_config(config)
  params = _params(spec, bias=0.0)
  model = ConvertedModel(spec, params, PREPROCESS, files)
  folder = huggingface.write(tmp_path / "a", model)
  # The defaults of this class itself are outside of its vocabulary, of which
  # transformers 5 warns once, whatever SigLIP is opened.
  transformers.SiglipTextConfig()
  root = logging.getLogger("transformers")
  root.addHandler(caplog.handler)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      # Deprecations inside transformers.
      warnings.simplefilter("ignore", DeprecationWarning)
      opened = transformers.AutoModel.from_pretrained(folder)
      processor = transformers.AutoProcessor.from_pretrained(
        folder, backend="pil"
      )
  finally:
    root.removeHandler(caplog.handler)
  assert [r.getMessage() for r in caplog.records] == []
  tokenizer, text = processor.tokenizer, opened.config.text_config
  for name in ("bos", "eos", "pad"):
    value = getattr(text, f"{name}_token_id")
    assert value is None or 0 <= value < text.vocab_size, name
  assert text.eos_token_id == tokenizer.eos_token_id == files.build().eos_id
  ids = processor(text=TEXTS, padding="max_length", truncation=True)
  np.testing.assert_array_equal(
    ids["input_ids"], files.build().encode(TEXTS, 16)
  )


@reference
@quiet
@pytest.mark.parametrize(
  "preprocess", [PREPROCESS, CROP], ids=["squash", "crop"]
)
@pytest.mark.parametrize("gelu", ["quick", "tanh"])
def test_transformers_opens_a_clip(tmp_path, preprocess, gelu):
  """Logits, pixels and ids of a `CLIPModel` are ours."""
  config = {**CLIP, "gelu": gelu, "text": {**CLIP["text"], "gelu": gelu}}
  spec = ModelSpec.from_config(config)
  params = _params(spec, bias=0.0)
  files = TokenizerFiles(None, "lower")
  model = ConvertedModel(spec, params, preprocess, files)
  folder = huggingface.write(tmp_path / "a", model)
  assert _assert_equal_logits(folder, _images(3), TEXTS) <= TOLERANCE
  back = huggingface.read(folder)
  assert back.spec == spec and back.preprocess == preprocess
  _assert_same(back.params, params)
  # As any CLIP, without our description.
  (folder / "mtv_jax.json").unlink()
  plain = huggingface.read(folder)
  assert plain.spec == dataclasses.replace(
    spec, image=dataclasses.replace(spec.image, mask_token=False)
  )
  got, want = _flat(plain.params), _flat(params)
  for name, value in got.items():
    np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_a_clip_with_a_bias_is_not_exported(tmp_path):
  spec = ModelSpec.from_config(CLIP)
  model = ConvertedModel(spec, _params(spec, bias=-10.0), PREPROCESS)
  with pytest.raises(ConversionError, match="CLIPModel has no bias.*-10"):
    huggingface.write(tmp_path / "a", model)
  assert not (tmp_path / "a").exists()
  text = dataclasses.replace(spec.text, causal=False)
  model = dataclasses.replace(model, spec=dataclasses.replace(spec, text=text))
  with pytest.raises(
    ConversionError, match=r"(?s)CLIPModel can't.*text\.causal"
  ):
    huggingface.write(tmp_path / "a", model)


@reference
@quiet
@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size"), [("B/16", 224), ("L/16", 256)])
def test_logits_on_real_photos(
  variant, size, photos, shared_data, tmp_path, record_property
):
  """The two shapes of MTV, on 16 photos, with a SentencePiece vocabulary."""
  piece = shared_data / "tokenizers" / "t5_cc_all_32000.spiece.model"
  files = TokenizerFiles(piece, "canonicalize")
  config = {
    "variant": variant,
    "image_size": size,
    "text": {
      "variant": variant.partition("/")[0],
      "length": 64,
      "vocab_size": files.build().vocab_size,
    },
  }
  spec = ModelSpec.from_config(config)
  params = _params(spec)
  preprocess = {"size": size, "resize": "squash", "interpolation": "bicubic"}
  model = ConvertedModel(spec, params, preprocess, files)
  folder = huggingface.write(tmp_path / "export", model)
  _assert_same(huggingface.read(folder).params, params)
  del params, model
  difference = _assert_equal_logits(folder, photos, TEXTS)
  record_property("difference", difference)
  print(f"{variant}: largest difference of the logits {difference:.2e}")


@reference
@quiet
def test_torchvision_pixels_are_near(photos, export):
  """transformers' default processor, where torchvision is installed."""
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torchvision")
  processor = transformers.AutoImageProcessor.from_pretrained(
    export, backend="torchvision"
  )
  images = [PIL.Image.fromarray(photo) for photo in photos]
  theirs = processor(images=images, return_tensors="np")["pixel_values"]
  preprocess = Preprocess.from_dict(PREPROCESS)
  ours = np.stack([preprocess(photo) for photo in photos])
  difference = np.abs(np.moveaxis(np.asarray(theirs), 1, -1) - ours)
  # It rounds once where Pillow rounds twice: a few pixels differ by one level.
  assert difference.max() <= 1.01 / 127.5
  assert (difference > 1e-4).mean() < 0.03


@reference
@quiet
def test_image_only_exports_as_a_vision_model(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  spec = ModelSpec.from_config({**SMALL, "text": None})
  params = {**_params(spec), "heads": {"dino": {"k": np.ones((2, 2), "f4")}}}
  folder = huggingface.write(
    tmp_path / "v", ConvertedModel(spec, params, PREPROCESS)
  )
  model, info = transformers.AutoModel.from_pretrained(
    folder, output_loading_info=True
  )
  assert type(model).__name__ == "SiglipVisionModel"
  assert not any(info.values()), info
  processor = transformers.AutoImageProcessor.from_pretrained(
    folder, backend="pil"
  )
  images = _images(2)
  inputs = processor(
    images=[PIL.Image.fromarray(i) for i in images], return_tensors="pt"
  )
  with torch.no_grad():
    expected = model(**inputs)
  back = huggingface.read(folder)
  _assert_same(back.params, params)
  encoder = Encoder(spec, back.params, Preprocess.from_dict(back.preprocess))
  ours = encoder.image(images)
  np.testing.assert_allclose(
    ours.pooled, expected.pooler_output.numpy(), atol=TOLERANCE
  )
  patches = ours.patches.reshape(2, 16, -1)
  np.testing.assert_allclose(
    patches, expected.last_hidden_state.numpy(), atol=TOLERANCE
  )


@reference
@quiet
def test_the_readme_runs(export, tmp_path, monkeypatch):
  pytest.importorskip("transformers")
  monkeypatch.chdir(tmp_path)
  PIL.Image.fromarray(_images(1)[0]).save("photo.jpg")
  blocks = re.findall(
    r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL
  )
  assert len(blocks) == 2
  scope = {"folder": str(export), "image": _images(1)[0]}
  for block in blocks:
    exec(block, scope)
  assert tuple(scope["logits"].shape) == (1, 2)
  assert scope["features"].pooled.shape == (1, 64)
