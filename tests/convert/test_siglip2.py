"""SigLIP 2 NaFlex against transformers: native aspect ratios."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tokenizer_parity
import tower_parity as parity

import mtv_jax
from mtv_jax.convert import huggingface
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder.preprocess import Preprocess, native_shape
from mtv_jax.models import two_tower
from mtv_jax.models.two_tower import ModelSpec

reference = pytest.mark.reference
# Deprecations inside transformers.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VISION = {
  "hidden_size": 48,
  "intermediate_size": 96,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "patch_size": 16,
  "num_patches": 16,
}
TEXT = {
  "hidden_size": 48,
  "intermediate_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "vocab_size": 99,
  "max_position_embeddings": 12,
  "bos_token_id": None,
  "eos_token_id": 1,
}
TRUE = {
  "patch_size": 16,
  "num_patches": 256,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
}
SHAPES = ((90, 60), (40, 200), (64, 64), (300, 299))


def _saved(folder, vision, *, scale=0.1, patches):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  text = {**TEXT, "hidden_size": vision["hidden_size"]}
  config = transformers.Siglip2Config(vision_config=vision, text_config=text)
  model = parity.add_noise(transformers.Siglip2Model(config), scale=scale)
  model.save_pretrained(folder)
  fields = {
    "image_processor_type": "Siglip2ImageProcessor",
    "patch_size": 16,
    "max_num_patches": patches,
    "resample": 2,
    "image_mean": [0.5, 0.4, 0.5],
    "image_std": [0.5, 0.5, 0.6],
  }
  (folder / "preprocessor_config.json").write_text(json.dumps(fields))
  return model


def _images():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (*s, 3), np.uint8) for s in SHAPES]


def _compare(folder, model):
  """The largest difference of the encoder on images of several shapes."""
  import torch
  import transformers

  processor = transformers.AutoImageProcessor.from_pretrained(
    folder, backend="pil"
  )
  images = _images()
  inputs = processor(
    images=[PIL.Image.fromarray(i) for i in images], return_tensors="pt"
  )
  with torch.no_grad():
    theirs = model.vision_model(
      pixel_values=inputs["pixel_values"],
      pixel_attention_mask=inputs["pixel_attention_mask"],
      spatial_shapes=inputs["spatial_shapes"],
      output_hidden_states=True,
    )
  encoder = mtv_jax.load(folder)
  depth = encoder.spec.image.depth
  ours = encoder.image(images, layers=range(depth), batch_size=3)
  grids = inputs["spatial_shapes"].numpy()
  np.testing.assert_array_equal(ours.grids, grids)
  valid = inputs["pixel_attention_mask"].numpy() > 0
  assert not valid.all()
  rows = [encoder.preprocess.patches(image)["patches"] for image in images]
  pixels = inputs["pixel_values"].numpy()
  np.testing.assert_array_equal(np.stack(rows), pixels)
  pairs = {
    "pooled": (ours.pooled, theirs.pooler_output),
    "last": (ours.patches[valid], theirs.last_hidden_state.numpy()[valid]),
  }
  for i in range(depth):
    hidden = theirs.hidden_states[i + 1].numpy()
    pairs[f"layer {i}"] = (ours.layers[i][valid], hidden[valid])
  return parity.largest_difference(pairs)


@reference
@quiet
def test_native_aspect_equals_transformers(tmp_path, record_property):
  import torch

  model = _saved(tmp_path / "a", VISION, patches=40)
  ours = huggingface.read(tmp_path / "a")
  record_property("difference", _compare(tmp_path / "a", model))
  tokens = np.random.default_rng(2).integers(3, 90, (4, 12)).astype(np.int32)
  with torch.no_grad():
    theirs = model.text_model(input_ids=torch.from_numpy(tokens).long())
  text = parity.run_text(ours, tokens)
  parity.largest_difference(
    {
      "tokens": (text.tokens, theirs.last_hidden_state),
      "text": (text.pooled, theirs.pooler_output),
    }
  )
  folder = huggingface.write(tmp_path / "b", ours)
  back = huggingface.read(folder)
  assert back.spec == ours.spec
  got, want = map(Preprocess.from_dict, (back.preprocess, ours.preprocess))
  assert got == want
  parity.assert_same_params(back.params, ours.params)
  opened = parity.assert_loads_whole(folder, "Siglip2Model")
  _compare(folder, opened)
  (folder / "mtv_jax.json").unlink()
  plain = huggingface.read(folder)
  assert plain.spec == ours.spec
  parity.assert_same_params(plain.params, ours.params)


@reference
@quiet
@pytest.mark.slow
def test_native_aspect_of_true_shape_equals_transformers(
  tmp_path, record_property
):
  model = _saved(tmp_path, TRUE, scale=0.01, patches=256)
  difference = _compare(tmp_path, model)
  record_property("difference", difference)
  print(f"SigLIP 2 NaFlex B: largest difference {difference:.2e}")


GEMMA_CONFIG = {
  "tokenizer_class": "GemmaTokenizer",
  "add_bos_token": False,
  "add_eos_token": True,
  "padding_side": "right",
  "do_lower_case": True,
  "model_input_names": ["input_ids"],
  "model_max_length": 64,
}
TOKENS = {
  "vocab_size": 400,
  "bos_token_id": 2,
  "eos_token_id": 1,
  "pad_token_id": 0,
}


def _save_with_gemma(folder, kind, files, *, length=64):
  """A model with a tokenizer in the form that a released folder has."""
  transformers = pytest.importorskip("transformers")
  text = {**TEXT, **TOKENS, "max_position_embeddings": length}
  vision = {**VISION, "num_hidden_layers": 1, "image_size": 64, "patch_size": 8}
  config = getattr(transformers, f"{kind}Config")(
    vision_config=vision, text_config=text
  )
  model = getattr(transformers, f"{kind}Model")(config)
  model.save_pretrained(folder)
  fields = {"image_processor_type": f"{kind}ImageProcessor"}
  if kind == "Siglip":
    fields["size"] = {"height": 64, "width": 64}
  else:
    fields |= {"max_num_patches": 40, "patch_size": 8}
  (folder / "preprocessor_config.json").write_text(json.dumps(fields))
  path = folder / "tokenizer.model"
  tokenizer_parity.train_sentencepiece(path, **tokenizer_parity.GEMMA)
  config = folder / "tokenizer_config.json"
  config.write_text(json.dumps(GEMMA_CONFIG))
  if files == "tokenizer.json":
    tokenizer = transformers.GemmaTokenizer.from_pretrained(folder)
    path.unlink()
    tokenizer.save_pretrained(folder)
    saved = json.loads(config.read_text())
    config.write_text(json.dumps(saved | GEMMA_CONFIG))
  return folder


@reference
@quiet
@pytest.mark.parametrize("files", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_ids_equal_those_of_transformers(tmp_path, monkeypatch, kind, files):
  monkeypatch.setenv("MTV_JAX_CACHE_DIR", str(tmp_path / "cache"))
  folder = _save_with_gemma(tmp_path / "a", kind, files)
  encoder = mtv_jax.load(folder)
  texts = tokenizer_parity.TEXTS
  if kind == "Siglip":
    # GemmaTokenizer does not lower-case, so that its users have to.
    texts = [encoder.tokenizer.clean_text(text) for text in texts]
  processor = _open_processor(folder)
  for theirs in (processor, processor.tokenizer):
    for length in (64, 5):
      tokenizer_parity.assert_equal_ids(
        encoder.tokenizer, theirs, length, texts
      )


@reference
@quiet
@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_processors_of_exports_equal_the_encoder(tmp_path, kind):
  import transformers

  length = 20
  source = _save_with_gemma(
    tmp_path / "a", kind, "tokenizer.json", length=length
  )
  folder = huggingface.write(tmp_path / "b", huggingface.read(source))
  encoder = mtv_jax.load(folder)
  processor = _open_processor(folder)
  assert type(processor).__name__ == f"{kind}Processor"
  tokenizer_parity.assert_equal_ids(encoder.tokenizer, processor, length)
  texts, images = tokenizer_parity.TEXTS, _images()
  # As the card has it, but for the backend.
  card = (folder / "README.md").read_text()
  assert ("max_num_patches=40,\n  patch_size=8" in card) == (kind == "Siglip2")
  patches = {"max_num_patches": 40, "patch_size": 8}
  inputs = processor(
    images=[PIL.Image.fromarray(image) for image in images],
    text=texts,
    padding="max_length",
    truncation=True,
    **(patches if kind == "Siglip2" else {}),
    return_tensors="pt",
  )
  np.testing.assert_array_equal(
    encoder.tokenizer.encode(texts, length), inputs["input_ids"]
  )
  pixels = inputs["pixel_values"].numpy()
  if kind == "Siglip2":
    rows = [encoder.preprocess.patches(image)["patches"] for image in images]
    np.testing.assert_array_equal(np.stack(rows), pixels)
  else:
    rows = np.stack([encoder.preprocess(image) for image in images])
    np.testing.assert_allclose(rows.transpose(0, 3, 1, 2), pixels, atol=1e-6)
  logits = transformers.AutoModel.from_pretrained(folder)(**inputs)
  image = encoder.image(images).pooled
  np.testing.assert_allclose(
    encoder.similarity(image, encoder.text(texts)),
    logits.logits_per_image.detach(),
    atol=1e-4,
  )


def _open_processor(folder):
  import transformers

  return transformers.AutoProcessor.from_pretrained(folder, backend="pil")


def _tower(**fields):
  spec = ModelSpec.from_config(
    {
      "variant": "mu/16",
      "depth": 1,
      "image_size": 64,
      "position_resize": "bilinear_antialiased",
      **fields,
    }
  )
  params = parity.random_params(spec)["image"]
  return spec, jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("pool", ["map", "mean"])
def test_padding_changes_no_output(pool):
  """An image alone, of its own size, has the outputs of the padded one."""
  spec, params = _tower(pool=pool)
  preprocess = Preprocess(64, "native", patch_size=16, max_patches=19)
  images = _images()[:2]
  rows = [preprocess.patches(image) for image in images]
  grids = np.stack([row["grids"] for row in rows])
  apply = jax.jit(two_tower.image_tower(spec).apply)
  padded = apply(
    {"params": params},
    jnp.asarray([row["patches"] for row in rows]),
    grids=jnp.asarray(grids),
  )
  for i, image in enumerate(images):
    pixels = jnp.asarray(preprocess(image)[None])
    alone = apply({"params": params}, pixels)
    n = grids[i].prod()
    assert n < 19
    np.testing.assert_allclose(
      padded.patches[i, :n], alone.patches[0], atol=1e-5
    )
    np.testing.assert_allclose(padded.pooled[i], alone.pooled[0], atol=1e-5)


def test_grids_need_positions_that_can_be_resampled():
  spec, params = _tower(position_resize="bicubic")
  with pytest.raises(ValueError, match="bilinear_antialiased.*'bicubic'"):
    two_tower.image_tower(spec).apply(
      {"params": params},
      jnp.zeros((1, 16, 768)),
      grids=jnp.ones((1, 2), int),
    )


@pytest.mark.parametrize("shape", [(3, 1000), (480, 640), (5000, 4000)])
def test_native_shapes_fill_the_limit(shape):
  rows, columns = (
    side // 16 for side in native_shape(*shape, patch_size=16, limit=256)
  )
  assert rows * columns <= 256
  # One patch more along each side would be too many.
  scale = max((rows + 1e-3) / shape[0], (columns + 1e-3) / shape[1]) * 16
  assert np.prod([np.ceil(side * scale / 16) for side in shape]) > 256


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"num_patches": 250}, "num_patches=250 is not a square"),
    ({"num_patches": "x"}, "num_patches"),
    ({"hidden_size": 128}, "sizes"),
    ({"hidden_act": "swish"}, "hidden_act='swish'"),
  ],
)
def test_wrong_folders_are_named(change, match, tmp_path):
  spec, params = _tower()
  preprocess = Preprocess(64, "native", patch_size=16, max_patches=20)
  model = ConvertedModel(spec, {"image": params}, preprocess.to_dict())
  folder = huggingface.write(tmp_path / "a", model)
  assert huggingface.read(folder).preprocess["max_patches"] == 20
  (folder / "mtv_jax.json").unlink()
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ValueError, match=match):
    huggingface.read(folder)
