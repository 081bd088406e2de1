"""Tokenizers and processors of released folders and of their exports."""

import json

import numpy as np
import PIL.Image
import pytest
import tokenizer_parity
import tokenizers
import tower_parity as parity

import mtv_jax
from mtv_jax.convert import huggingface

pytestmark = [
  pytest.mark.reference,
  # Deprecations inside transformers.
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BLOCK = parity.tower(48, 1, 2, 64)
VISION = {**BLOCK, "image_size": 64, "patch_size": 16}
SIGLIP_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
GEMMA_CONFIG = {
  "tokenizer_class": "GemmaTokenizer",
  "add_bos_token": False,
  "add_eos_token": True,
  "padding_side": "right",
  "do_lower_case": True,
  "model_input_names": ["input_ids"],
  "model_max_length": 64,
}
SQUARE = {"height": 64, "width": 64}
# By class: fields of the two sections, of the image processor, the length.
MODELS = {
  "Siglip": (VISION, SIGLIP_IDS, {"size": SQUARE}, 20),
  "Siglip2": (
    {**BLOCK, "patch_size": 8, "num_patches": 64},
    SIGLIP_IDS,
    {"max_num_patches": 40, "patch_size": 8},
    20,
  ),
  "Aimv2": (
    VISION,
    {},
    {"size": {"shortest_edge": 64}, "crop_size": SQUARE, "resample": 3},
    12,
  ),
  "Tipsv2": (
    {**VISION, "mlp_ratio": 2, "num_register_tokens": 1}, {}, None, 12,
  ),
}  # fmt: skip


def save_clip_tokenizer(folder):
  """A byte-level BPE whose words have an end; returns its size."""
  import transformers

  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  names = [*letters, *(f"{letter}</w>" for letter in letters)]
  merges = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("p", "h")]
  names += [*map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
  vocab = {name: i for i, name in enumerate(names)}
  tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
  tokenizer.save_pretrained(folder)
  return len(vocab)


def save_sentencepiece(folder, kind, files):
  """A SentencePiece model in either form that released folders have."""
  import transformers

  path, config = folder / "tokenizer.model", folder / "tokenizer_config.json"
  options = tokenizer_parity.TIPS
  if kind != "Tipsv2":
    options = tokenizer_parity.GEMMA
    config.write_text(json.dumps(GEMMA_CONFIG))
  tokenizer_parity.train_sentencepiece(path, **options)
  if files == "tokenizer.json":
    tokenizer = transformers.GemmaTokenizer.from_pretrained(folder)
    path.unlink()
    tokenizer.save_pretrained(folder)
    saved = json.loads(config.read_text())
    config.write_text(json.dumps(saved | GEMMA_CONFIG))
  return 400


def save_folder(folder, kind, files, *, length=None):
  """A model with a tokenizer as in the released folders."""
  pytest.importorskip("transformers")
  folder.mkdir()
  vision, ids, processor, default = MODELS[kind]
  if kind == "Aimv2":
    size = save_clip_tokenizer(folder)
    ids = {"eos_token_id": size - 1}
  else:
    size = save_sentencepiece(folder, kind, files)
  text = {**BLOCK, **ids, "vocab_size": size}
  text["max_position_embeddings"] = length or default
  parity.save_model(
    folder, f"{kind}Model", vision_config=vision, text_config=text
  )
  if processor:
    name = "CLIP" if kind == "Aimv2" else kind
    processor = {"image_processor_type": f"{name}ImageProcessor", **processor}
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(processor))
  return folder


@pytest.mark.parametrize(
  ("kind", "files"),
  [
    ("Siglip", "tokenizer.json"),
    ("Siglip", "tokenizer.model"),
    ("Siglip2", "tokenizer.json"),
    ("Siglip2", "tokenizer.model"),
    ("Aimv2", "tokenizer.json"),
    ("Tipsv2", "tokenizer.model"),
  ],
)
def test_ids_equal_those_of_transformers(kind, files, tmp_path, monkeypatch):
  import transformers

  monkeypatch.setenv("MTV_JAX_CACHE_DIR", str(tmp_path / "cache"))
  folder = save_folder(tmp_path / "a", kind, files, length=64)
  ours = huggingface.read(folder).tokenizer.build()
  texts = tokenizer_parity.TEXTS
  theirs = [transformers.AutoTokenizer.from_pretrained(folder)]
  if kind == "Siglip":
    # GemmaTokenizer does not lower-case, so that its users have to.
    texts = [ours.clean_text(text) for text in texts]
  if kind.startswith("Siglip"):
    theirs.append(
      transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    )
  for tokenizer in theirs:
    for length in (64, 12, 5):
      tokenizer_parity.assert_equal_ids(ours, tokenizer, length, texts)


@pytest.mark.parametrize("kind", MODELS)
def test_processors_of_exports_equal_the_encoder(kind, tmp_path, monkeypatch):
  """Ids, pixels and logits."""
  import transformers

  monkeypatch.setenv("MTV_JAX_CACHE_DIR", str(tmp_path / "cache"))
  files = "tokenizer.model" if kind == "Tipsv2" else "tokenizer.json"
  source = save_folder(tmp_path / "a", kind, files)
  folder = huggingface.write(tmp_path / "b", huggingface.read(source))
  encoder, length = mtv_jax.load(folder), MODELS[kind][3]
  processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
  tokenizer_parity.assert_equal_ids(encoder.tokenizer, processor, length)
  texts, atol, options = tokenizer_parity.TEXTS, 1e-4, {}
  if kind in ("Aimv2", "Tipsv2"):
    # A text is not only padding, and the tower masks its padding.
    texts = [t for t in texts if t.strip() and "<pad>" not in t]
    atol = 2e-4
  if kind == "Siglip2":
    options = MODELS[kind][2]  # As the card has it.
    card = (folder / "README.md").read_text()
    assert "max_num_patches=40,\n  patch_size=8" in card
  rng, shapes = np.random.default_rng(0), ((90, 60), (40, 200), (64, 64))
  images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
  inputs = processor(
    images=[PIL.Image.fromarray(image) for image in images],
    text=texts,
    padding="max_length",
    truncation=True,
    return_tensors="pt",
    **options,
  )
  pixels = inputs["pixel_values"].numpy()
  if kind == "Siglip2":
    rows = [encoder.preprocess.patches(image)["patches"] for image in images]
    np.testing.assert_array_equal(np.stack(rows), pixels)
  else:
    rows = np.stack([encoder.preprocess(image) for image in images])
    np.testing.assert_allclose(rows.transpose(0, 3, 1, 2), pixels, atol=1e-6)
  theirs = transformers.AutoModel.from_pretrained(folder)(**inputs)
  image = encoder.image(images, outputs=("pooled",)).pooled
  logits = encoder.similarity(image, encoder.text(texts))
  want = theirs.logits_per_image.detach()
  np.testing.assert_allclose(logits, want, atol=atol)
