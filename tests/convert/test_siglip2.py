"""SigLIP 2 NaFlex against transformers: native aspect ratios."""

import json

import jax
import jax.numpy as jnp
import library_process
import numpy as np
import PIL.Image
import pytest
import tower_parity as parity

import mtv_jax
from mtv_jax.convert import huggingface
from mtv_jax.encoder.preprocess import Preprocess, native_shape
from mtv_jax.models import two_tower
from mtv_jax.models.two_tower import ModelSpec

reference = pytest.mark.reference
# Deprecations inside transformers.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VISION = parity.tower(48, 3, 4, 96, patch_size=16, num_patches=16)
TEXT = dict(
  vocab_size=99, max_position_embeddings=12, bos_token_id=None, eos_token_id=1
)
TRUE = parity.tower(768, 3, 12, 3072, patch_size=16, num_patches=256)
SHAPES = ((90, 60), (40, 200), (64, 64), (300, 299))


def _saved(folder, vision, *, scale=0.1, patches):
  model = parity.save_model(
    folder,
    "Siglip2Model",
    scale=scale,
    vision_config=vision,
    text_config=parity.tower(vision["hidden_size"], 2, 2, 64, **TEXT),
  )
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
    theirs = model.vision_model(**inputs, output_hidden_states=True)
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
  opened = library_process.load_model(folder, "Siglip2Model")
  _compare(folder, opened)
  (folder / "mtv_jax.json").unlink()
  plain = huggingface.read(folder)
  assert plain.spec == ours.spec
  parity.assert_same_params(plain.params, ours.params)


@reference
@quiet
@pytest.mark.slow
@pytest.mark.long
def test_native_aspect_of_true_width(tmp_path, record_property):
  model = _saved(tmp_path, TRUE, scale=0.01, patches=256)
  record_property("difference", _compare(tmp_path, model))


def _tower(*, position_resize="bilinear_antialiased", **fields):
  block = dict(variant="mu/16", depth=1, image_size=64)
  block["position_resize"] = position_resize
  spec = ModelSpec.from_config({**block, **fields})
  params = parity.random_params(spec)["image"]
  return spec, jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("pool", ["map", "mean"])
def test_padding_changes_no_output(pool):
  """A single unpadded image has the outputs of the padded one."""
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
    patches = padded.patches[i, :n]
    np.testing.assert_allclose(patches, alone.patches[0], atol=1e-5)
    np.testing.assert_allclose(padded.pooled[i], alone.pooled[0], atol=1e-5)


def test_grids_need_positions_that_can_be_resampled():
  spec, params = _tower(position_resize="bicubic")
  patches, grids = jnp.zeros((1, 16, 768)), jnp.ones((1, 2), int)
  with pytest.raises(ValueError, match="bilinear_antialiased.*'bicubic'"):
    two_tower.image_tower(spec).apply({"params": params}, patches, grids=grids)


@pytest.mark.parametrize("shape", [(3, 1000), (480, 640), (5000, 4000)])
def test_native_shapes_fill_the_limit(shape):
  rows, columns = (
    side // 16 for side in native_shape(*shape, patch_size=16, limit=256)
  )
  assert rows * columns <= 256
  # One patch more along each side would be too many.
  scale = max((rows + 1e-3) / shape[0], (columns + 1e-3) / shape[1]) * 16
  assert np.prod([np.ceil(side * scale / 16) for side in shape]) > 256
