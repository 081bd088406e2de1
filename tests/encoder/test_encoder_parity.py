"""Encoder.image and .dense of Hugging Face folders equal transformers.

Every layer with its prefix tokens, the final tokens and the pooled vector, at
the stored size and at others, where both sides resample the positions.
"""

import jax
import numpy as np
import pytest

import mtv_jax
from mtv_jax.parallel.mesh import make_mesh

TOLERANCE = 1e-4
DEPTH = 3
SHAPE = {
  "hidden_size": 48,
  "num_hidden_layers": DEPTH,
  "num_attention_heads": 4,
  "image_size": 64,
  "patch_size": 16,
}
TEXT = {
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "vocab_size": 99,
  "max_position_embeddings": 8,
}
MEAN, STD = (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)
KINDS = ("siglip", "siglip2", "clip", "dinov2", "dinov2_registers")


def make(transformers, kind):
  t, mlp = transformers, {"intermediate_size": 96}
  if kind.startswith("siglip"):
    # SigLIP 2 of fixed resolution has SigLIP's classes, a larger vocabulary
    # and, in some sizes, a text tower of another width.
    text = {**TEXT, "projection_size": 48}
    if kind == "siglip2":
      text |= {"vocab_size": 300, "num_hidden_layers": 2}
    vision = {**SHAPE, **mlp, "patch_size": 8 if kind == "siglip2" else 16}
    return t.SiglipModel(t.SiglipConfig(vision_config=vision, text_config=text))
  if kind == "clip":
    text = {**TEXT, "eos_token_id": 98}
    return t.CLIPModel(
      t.CLIPConfig(
        vision_config={**SHAPE, **mlp}, text_config=text, projection_dim=24
      )
    )
  if kind == "dinov2":
    return t.Dinov2Model(t.Dinov2Config(**SHAPE, mlp_ratio=2))
  return t.Dinov2WithRegistersModel(
    t.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, num_register_tokens=3)
  )


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  """By kind, once: transformers' model and our encoder of its folder."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  loaded = {}

  def get(kind):
    if kind not in loaded:
      torch.manual_seed(0)
      model = make(transformers, kind).eval()
      with torch.no_grad():
        for parameter in model.parameters():
          # No parameter is left at zero or one.
          parameter.add_(0.1 * torch.randn_like(parameter))
      folder = tmp_path_factory.mktemp(kind)
      model.save_pretrained(folder)
      square = {"height": 64, "width": 64}
      transformers.SiglipImageProcessorPil(
        size=square, image_mean=MEAN, image_std=STD
      ).save_pretrained(folder)
      loaded[kind] = model, mtv_jax.load(folder)
    return loaded[kind]

  return get


def theirs(model, kind, images):
  """Hidden states, final tokens and pooled vectors, as NumPy arrays."""
  import torch

  pixels = (images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
  pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
  vision, options = model, {}
  if not kind.startswith("dinov2"):
    vision, options = model.vision_model, {"interpolate_pos_encoding": True}
  with torch.no_grad():
    out = vision(pixels, output_hidden_states=True, **options)
    last, pooled = out.last_hidden_state, out.pooler_output
    if kind == "clip":
      # Its last_hidden_state lacks the norm that its pooled token has.
      last = vision.post_layernorm(last)
      pooled = model.visual_projection(pooled)
  hidden = [state.numpy() for state in out.hidden_states[1:]]
  return hidden, last.numpy(), pooled.numpy()


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_equal_transformers(kind, size, opened):
  model, encoder = opened(kind)
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (3, *size, 3), np.uint8)
  hidden, last, pooled = theirs(model, kind, images)
  ours = encoder.dense(
    images, layers=range(DEPTH), outputs=("pooled", "patches", "prefix")
  )
  patch = encoder.spec.image.patch_size
  grid = (size[0] // patch, size[1] // patch)
  assert ours.patches.shape == (3, *grid, 48)
  prefix = encoder.spec.image.prefix
  assert prefix == {"siglip": 0, "siglip2": 0, "dinov2_registers": 4}.get(
    kind, 1
  )

  def together(first, patches):
    return np.concatenate([first, patches.reshape(3, -1, 48)], axis=1)

  assert len(hidden) == DEPTH
  for layer, want in enumerate(hidden):
    got = together(ours.prefix_layers[layer], ours.layers[layer])
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    assert np.std(want) > 0.1
  got = together(ours.prefix, ours.patches)
  np.testing.assert_allclose(got, last, atol=TOLERANCE)
  np.testing.assert_allclose(ours.pooled, pooled, atol=TOLERANCE)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["siglip", "dinov2_registers"])
def test_batch_size_and_devices_do_not_change_results(kind, opened):
  model, encoder = opened(kind)
  rng = np.random.default_rng(2)
  images = rng.integers(0, 256, (5, 64, 64, 3), np.uint8)
  hidden, last, pooled = theirs(model, kind, images)
  mesh = make_mesh({"data": -1}, jax.devices()[:1])
  single = type(encoder)(
    encoder.spec,
    jax.tree.map(np.asarray, encoder.params),
    encoder.preprocess,
    mesh=mesh,
  )
  prefix = encoder.spec.image.prefix
  for one, batch_size in ((encoder, 8), (single, 2), (single, 64)):
    ours = one.image(images, layers=(-1,), batch_size=batch_size)
    np.testing.assert_allclose(ours.pooled, pooled, atol=TOLERANCE)
    np.testing.assert_allclose(
      ours.patches.reshape(5, 16, 48), last[:, prefix:], atol=TOLERANCE
    )
    np.testing.assert_allclose(
      ours.layers[-1].reshape(5, 16, 48),
      hidden[-1][:, prefix:],
      atol=TOLERANCE,
    )
