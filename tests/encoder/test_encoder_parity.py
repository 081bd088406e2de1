"""Encoder.image and .dense of Hugging Face folders equal transformers.

With the folder's own image processor: every layer with its prefix tokens, the
final tokens and the pooled vector, at the stored size and at another one, where
both sides resample the positions.
"""

import numpy as np
import PIL.Image
import pytest
import tower_parity as parity

import mtv_jax

SHAPE = {
  "hidden_size": 32,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "image_size": 32,
  "patch_size": 8,
}
VISION = {**SHAPE, "intermediate_size": 64}
TEXT = {
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "vocab_size": 99,
  "max_position_embeddings": 8,
}
TWO_TOWERS = {"vision_config": VISION, "text_config": TEXT}
# The model's class and config, the processor's class, the number of CLS tokens
# and registers.
KINDS = {
  "siglip": ("SiglipModel", TWO_TOWERS, "Siglip", 0),
  "clip": ("CLIPModel", {**TWO_TOWERS, "projection_dim": 24}, "CLIP", 1),
  "dinov2": (
    "Dinov2WithRegistersModel",
    {**SHAPE, "mlp_ratio": 2, "num_register_tokens": 3},
    "Bit",
    4,
  ),
}
OUTPUTS = ("pooled", "patches", "prefix")


def theirs(model, pixels):
  """Hidden states, final tokens and pooled vectors, as NumPy arrays."""
  import torch

  vision, options = getattr(model, "vision_model", model), {}
  if vision is not model:
    options["interpolate_pos_encoding"] = True
  with torch.no_grad():
    out = vision(pixels, output_hidden_states=True, **options)
    last, pooled = out.last_hidden_state, out.pooler_output
    if hasattr(model, "visual_projection"):
      # CLIP's last_hidden_state lacks the norm that its pooled token has.
      last = vision.post_layernorm(last)
      pooled = model.visual_projection(pooled)
  hidden = [state.numpy() for state in out.hidden_states[1:]]
  return hidden, last.numpy(), pooled.numpy()


def assert_equal(ours, model, pixels, grid):
  def tokens(prefix, patches):
    assert patches.shape[1:3] == grid
    flat = patches.reshape(len(patches), -1, patches.shape[-1])
    return np.concatenate([prefix, flat], axis=1)

  hidden, last, pooled = theirs(model, pixels)
  pairs = {
    "last": (tokens(ours.prefix, ours.patches), last),
    "pooled": (ours.pooled, pooled),
  }
  for i, layer in enumerate((0, 1, -1)):
    got = tokens(ours.prefix_layers[layer], ours.layers[layer])
    pairs[f"layer {layer}"] = (got, hidden[i])
  parity.largest_difference(pairs)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_equal_transformers(kind, tmp_path):
  transformers = pytest.importorskip("transformers")
  class_name, config, name, prefix = KINDS[kind]
  model = parity.save_model(tmp_path, class_name, **config)
  square = {"height": 32, "width": 32}
  options = {"size": square}
  if name != "Siglip":
    options = {"size": {"shortest_edge": 36}, "crop_size": square}
  processor = getattr(transformers, f"{name}ImageProcessorPil")(**options)
  processor.save_pretrained(tmp_path)
  encoder = mtv_jax.load(tmp_path)
  assert encoder.spec.image.prefix == prefix
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (40, 30 + i, 3), np.uint8) for i in range(3)]
  inputs = processor(
    [PIL.Image.fromarray(image) for image in images], return_tensors="pt"
  )
  ours = encoder.image(images, layers=(0, 1, -1), outputs=OUTPUTS)
  assert_equal(ours, model, inputs["pixel_values"], (4, 4))
  tall = rng.integers(0, 256, (2, 48, 24, 3), np.uint8)
  ours = encoder.dense(tall, layers=(0, 1, -1), outputs=OUTPUTS)
  pixels = np.stack([encoder.preprocess.normalize(image) for image in tall])
  assert_equal(ours, model, parity.as_torch(pixels), (6, 3))
