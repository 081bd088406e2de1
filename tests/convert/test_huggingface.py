"""Hugging Face folders against transformers, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.convert import huggingface
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import two_tower as models
from mtv_jax.utils.tree import flatten_with_names

TOLERANCE = 1e-4
VISION = {
  "hidden_size": 48,
  "intermediate_size": 96,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "image_size": 64,
  "patch_size": 16,
}
TEXT = {
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "vocab_size": 99,
  "max_position_embeddings": 12,
}
DINO = {k: v for k, v in VISION.items() if k != "intermediate_size"}

reference = pytest.mark.reference
# Deprecations inside transformers.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _flat(tree):
  return dict(flatten_with_names(tree))


def _image(ours, pixels, **options):
  params = jax.tree.map(jnp.asarray, ours.params["image"])
  tower = models.image_tower(ours.spec)
  apply = jax.jit(lambda p, x: tower.apply({"params": p}, x, **options))
  return apply(params, jnp.asarray(pixels))


def _text(ours, tokens):
  params = jax.tree.map(jnp.asarray, ours.params["text"])
  tower = models.text_tower(ours.spec)
  apply = jax.jit(lambda p, x: tower.apply({"params": p}, x))
  return apply(params, jnp.asarray(tokens))


# ---------------------------------------------------------------------------
# Reading folders of transformers.


def _add_noise(torch, model, *, seed=0):
  """Adds noise to a model, so that no parameter is zero or one."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.add_(0.1 * noise)
  return model.eval()


def _saved(transformers, torch, kind, folder):
  t = transformers
  siglip = t.SiglipConfig(
    vision_config=VISION,
    text_config={**TEXT, "projection_size": 48, "layer_norm_eps": 1e-5},
  )
  exact = dict(VISION, hidden_act="gelu")
  clip = {
    "vision_config": VISION,
    "text_config": {**TEXT, "eos_token_id": 98},
    "projection_dim": 40,
  }
  # The rule of old files: the highest id is the end.
  old = dict(clip, text_config={**TEXT, "eos_token_id": 2})
  build = {
    "siglip": lambda: t.SiglipModel(siglip),
    "siglip_vision": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**exact)),
    "siglip_headless": lambda: t.SiglipVisionModel(
      t.SiglipVisionConfig(**VISION, vision_use_head=False)
    ),
    "clip": lambda: t.CLIPModel(t.CLIPConfig(**clip)),
    "clip_old": lambda: t.CLIPModel(t.CLIPConfig(**old)),
    "clip_vision": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
    "clip_projected": lambda: t.CLIPVisionModelWithProjection(
      t.CLIPVisionConfig(**VISION, projection_dim=40)
    ),
    "dinov2": lambda: t.Dinov2Model(
      t.Dinov2Config(**DINO, mlp_ratio=2, layerscale_value=0.5)
    ),
    "dinov2_swiglu": lambda: t.Dinov2Model(
      t.Dinov2Config(**DINO, mlp_ratio=4, use_swiglu_ffn=True)
    ),
    "dinov2_registers": lambda: t.Dinov2WithRegistersModel(
      t.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
    ),
  }[kind]
  torch.manual_seed(0)
  model = _add_noise(torch, build())
  model.save_pretrained(folder)
  return model


def _tower(kind):
  two = kind in ("siglip", "clip", "clip_old", "clip_projected")
  return (lambda m: m.vision_model) if two else (lambda m: m)


@reference
@quiet
@pytest.mark.parametrize(
  ("kind", "size"),
  [
    ("siglip", 64),
    ("siglip", 96),
    ("siglip", 48),
    ("siglip_vision", 64),
    ("siglip_headless", 64),
    ("clip", 64),
    ("clip", 96),
    ("clip_vision", 64),
    ("clip_projected", 64),
    ("dinov2", 64),
    ("dinov2", 96),
    ("dinov2_swiglu", 64),
    ("dinov2_registers", 64),
    ("dinov2_registers", 96),
    # Where antialiasing of the positions matters most.
    ("dinov2_registers", 48),
  ],
)
def test_image_towers_equal_transformers(kind, size, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = _saved(transformers, torch, kind, tmp_path)
  ours = huggingface.read(tmp_path)
  assert ours.spec.image.image_size == 64
  want = {
    n: a.shape for n, a in _flat(models.abstract_params(ours.spec)).items()
  }
  got = {
    n: a.shape
    for n, a in _flat(ours.params).items()
    if not n.startswith("heads/")
  }
  assert got == want

  pixels = np.random.default_rng(1).normal(size=(2, size, size, 3))
  pixels = pixels.astype(np.float32)
  depth = ours.spec.image.depth
  out = _image(ours, pixels, taps=tuple(range(depth)))

  options = {"output_hidden_states": True}
  if not kind.startswith("dinov2"):
    options["interpolate_pos_encoding"] = size != 64
  with torch.no_grad():
    theirs = _tower(kind)(model)(
      torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), **options
    )
  for layer in range(depth):
    hidden = theirs.hidden_states[layer + 1].numpy()
    assert hidden.shape == out.taps[layer].shape
    np.testing.assert_allclose(out.taps[layer], hidden, atol=TOLERANCE)
  last = np.concatenate([out.prefix, out.patches], axis=1)
  if not kind.startswith("clip"):
    # CLIP's last_hidden_state is before the final norm, and checked above.
    np.testing.assert_allclose(
      last, theirs.last_hidden_state.numpy(), atol=TOLERANCE
    )
  pooled = theirs.pooler_output
  with torch.no_grad():
    if ours.spec.image.projection:
      pooled = model.visual_projection(pooled)
  if pooled is None:
    pooled = theirs.last_hidden_state.mean(1)
  np.testing.assert_allclose(out.pooled, pooled.numpy(), atol=TOLERANCE)


@reference
@quiet
@pytest.mark.parametrize("kind", ["siglip", "clip", "clip_old"])
def test_text_towers_and_logits_equal_transformers(kind, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = _saved(transformers, torch, kind, tmp_path)
  ours = huggingface.read(tmp_path)
  rng = np.random.default_rng(2)
  pixels = rng.normal(size=(3, 64, 64, 3)).astype(np.float32)
  tokens = rng.integers(3, 90, (4, 12)).astype(np.int32)
  # The texts end at different positions, followed by padding.
  for row, end in enumerate((3, 6, 11, 8)):
    tokens[row, end:] = 98
  image = _image(ours, pixels)
  text = _text(ours, tokens)
  with torch.no_grad():
    theirs = model(
      pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
      input_ids=torch.from_numpy(tokens.astype(np.int64)),
    )
  text_out = theirs.text_model_output
  np.testing.assert_allclose(
    text.tokens, text_out.last_hidden_state.numpy(), atol=TOLERANCE
  )
  encoder = Encoder(
    ours.spec, ours.params, Preprocess.from_dict(ours.preprocess)
  )
  logits = encoder.similarity(np.asarray(image.pooled), np.asarray(text.pooled))
  expected = theirs.logits_per_image.numpy()
  assert np.ptp(expected) > 0.01
  np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


@reference
@quiet
@pytest.mark.parametrize("how", ["sharded", "bfloat16", "classifier", "old"])
def test_other_forms_of_files_have_equal_parameters(how, tmp_path):
  """Shards, half precision, a classifier's head, names of transformers 4."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config = transformers.SiglipConfig(
    vision_config=VISION, text_config={**TEXT, "projection_size": 48}
  )
  if how == "classifier":
    model = transformers.SiglipForImageClassification(config)
  elif how == "old":
    model = transformers.SiglipVisionModel(config.vision_config)
  else:
    model = transformers.SiglipModel(config)
  model = _add_noise(torch, model)
  if how == "bfloat16":
    model = model.to(torch.bfloat16)
  options = {"max_shard_size": "60KB"} if how == "sharded" else {}
  model.save_pretrained(tmp_path, **options)
  if how == "sharded":
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
  if how == "old":
    from safetensors.numpy import load_file, save_file

    file = str(tmp_path / "model.safetensors")
    renamed = {f"vision_model.{k}": v for k, v in load_file(file).items()}
    ids = np.arange(16)[None]
    renamed["vision_model.embeddings.position_ids"] = ids
    save_file(renamed, file)
  ours = huggingface.read(tmp_path)
  assert (ours.spec.text is None) == (how in ("classifier", "old"))
  state = model.state_dict()
  prefix = "" if how == "old" else "vision_model."
  expected = state[f"{prefix}encoder.layers.2.mlp.fc2.weight"].float().numpy()
  got = ours.params["image"]["blocks"]["mlp"]["fc2"]["kernel"]
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got[2], expected.T)


@reference
@quiet
def test_published_configs_without_their_defaults(tmp_path):
  """config.json as on the Hub: only the differences from the defaults."""
  transformers = pytest.importorskip("transformers")
  from mtv_jax.convert import clip, siglip

  short = {"model_type": "siglip", "text_config": {}, "vision_config": {}}
  names = ["text_model.head.weight"]
  ours = siglip.read_spec(short, names)
  full = transformers.SiglipConfig()
  again = siglip.read_spec(full.to_dict(), names)
  assert ours == again
  assert ours.image.width == full.vision_config.hidden_size

  # Early CLIPs have two sections; the second one wins, defaults included.
  twice = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 512, "eos_token_id": 2},
    "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
    "vision_config": {"hidden_size": 1024, "num_attention_heads": 16},
  }
  ours = clip.read_spec(twice, names)
  full = transformers.CLIPConfig(**twice)
  assert ours.text.width == full.text_config.hidden_size == 768
  assert ours.text.eos_id == full.text_config.eos_token_id
  assert ours.image.patch_size == full.vision_config.patch_size
