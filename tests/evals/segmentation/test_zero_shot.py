"""Zero-shot segmentation: patch embeddings and metrics."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_trees import random_params

from mtv_jax.data import tokenizers
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.core import prompts
from mtv_jax.evals.core.examples import SegmentationSet, open_items
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.segmentation import zero_shot
from mtv_jax.evals.segmentation.zero_shot import ZeroShotSegmentation
from mtv_jax.models import layers
from mtv_jax.models import two_tower as models
from mtv_jax.models.text import TextSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.parallel.mesh import make_mesh

SHAPE = {"width": 16, "heads": 2, "mlp_dim": 24}
TEXT = TextSpec(vocab_size=258, length=24, depth=1, projection=16, **SHAPE)
TOWERS = {
  "map": ViTSpec(image_size=16, patch_size=8, depth=2, pool="map", **SHAPE),
  "mean": ViTSpec(
    image_size=16,
    patch_size=8,
    depth=2,
    pool="mean",
    projection=16,
    layer_scale=1.0,
    mlp="swiglu",
    **SHAPE,
  ),
}
TOWERS["normed"] = dataclasses.replace(
  TOWERS["mean"], mlp_norm=True, pool_norm=True
)


def build(pool, *, devices=None, depth=2, seed=0):
  spec = models.ModelSpec(
    image=dataclasses.replace(TOWERS[pool], depth=depth), text=TEXT
  )
  params = random_params(spec, std=0.4, seed=seed)
  tokenizer = tokenizers.build_tokenizer("bytes", clean="lower")
  mesh = make_mesh({"data": -1}, devices)
  return Encoder(spec, params, Preprocess(size=16), tokenizer, mesh)


@pytest.mark.parametrize("pool", TOWERS)
def test_the_embedding_of_a_single_patch_is_the_images(pool):
  # Attention over a single token is its value, in block and pool.
  encoder = build(pool, devices=jax.devices()[:1])
  rng = np.random.default_rng(1)
  images = list(rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8))
  pooled = encoder.dense(images, outputs=("pooled",)).pooled
  patches = zero_shot.embed_patches(
    encoder, images, last_block="values", batch_size=16
  )
  assert patches.shape == (3, 1, 1, 16)
  assert patches.dtype == np.float32
  np.testing.assert_allclose(patches[:, 0, 0], pooled, rtol=1e-4, atol=1e-4)
  assert np.abs(pooled[0] - pooled[1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["map", "mean"])
def test_patches_are_embedded_independently(pool):
  """The last block's values and the pool act on each patch separately."""
  encoder = build(pool, depth=3, devices=jax.devices()[:1])
  image = list(np.random.default_rng(2).integers(0, 256, (1, 16, 24, 3), "u1"))
  tokens = encoder.dense(image, layers=(1,), outputs=()).layers[1]
  attention, values = (
    zero_shot.embed_patches(encoder, image, last_block=kind, batch_size=1)
    for kind in ("attention", "values")
  )
  # A tower with only the last block, run on one token at a time.
  block = jax.tree.map(lambda p: p[2], encoder.params["image"]["blocks"])
  expected = alone(encoder, block, jnp.asarray(tokens.reshape(6, 16)))
  got = values.reshape(6, 16)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
  assert np.abs(attention - values).max() > 0.01
  if pool == "mean":
    # Projection is linear, so that the pooled image is its patches' mean.
    pooled = encoder.dense(image, outputs=("pooled",)).pooled
    mean = attention.mean(axis=(1, 2))
    np.testing.assert_allclose(mean, pooled, atol=1e-4)


def alone(encoder, block, tokens):
  """Block, norm, pool and projection of sequences of one token each."""
  spec, params = encoder.spec.image, encoder.params["image"]
  module = layers.Block(
    heads=spec.heads,
    mlp_dim=spec.mlp_dim,
    gelu=spec.gelu,
    mlp=spec.mlp,
    layer_scale=spec.layer_scale,
    norm_eps=spec.norm_eps,
  )
  x = module.apply({"params": block}, tokens[:, None])
  x = layers.norm(spec.norm_eps, "float32", "norm").apply(
    {"params": params["norm"]}, x
  )
  if spec.pool == "map":
    pool = layers.MapPool(spec.heads, spec.mlp_dim, spec.gelu, spec.norm_eps)
    x = pool.apply({"params": params["pool"]}, x)
  else:
    x = x[:, 0]
  if spec.projection:
    x = x @ params["projection"]["kernel"]
  return x


def test_default_last_block():
  assert zero_shot.default_last_block(build("map")) == "attention"
  assert zero_shot.default_last_block(build("mean")) == "values"
  shallow = build("mean", depth=1)
  assert zero_shot.default_last_block(shallow) == "attention"
  with pytest.raises(ValueError, match="one block"):
    zero_shot.check_patch_text(shallow, "values")
  with pytest.raises(ValueError, match="last_block is 'value'"):
    zero_shot.check_patch_text(shallow, "value")


def test_towers_without_a_pool_are_rejected():
  encoder = build("map")
  image = {k: v for k, v in encoder.params["image"].items() if k != "pool"}
  encoder.params = {**encoder.params, "image": image}
  with pytest.raises(ValueError, match="lacks pool: its patches can't"):
    zero_shot.check_patch_text(encoder, "attention")


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def colour_blocks(monkeypatch):
  """Blocks of colour named by their class, and an encoder of colours."""
  rng = np.random.default_rng(0)
  cells = rng.integers(0, 3, (4, 2, 3))
  maps = np.kron(cells, np.ones((1, 24, 24))).astype(np.uint8)
  colours = np.array(list(COLOURS.values()), np.uint8)
  data = SegmentationSet(
    kind="ade20k",
    name="blocks",
    images=open_items(list(colours[maps]), np.asarray),
    maps=open_items(list(maps), np.asarray),
    classes=tuple(COLOURS),
    class_count=3,
    digest="blocks",
  )
  monkeypatch.setattr(
    registry, "open_segmentation", lambda data_, *, split, count: data
  )

  def patches(encoder, images, *, last_block, batch_size):
    x = np.stack([np.asarray(i, np.float32) for i in images])
    n, h, w, _ = x.shape
    return x.reshape(n, h // 8, 8, w // 8, 8, 3).mean(axis=(2, 4))

  def text(strings, batch_size=256):
    names = [next(n for n in COLOURS if n in s) for s in strings]
    return np.asarray([COLOURS[n] for n in names], np.float32)

  monkeypatch.setattr(zero_shot, "embed_patches", patches)
  encoder = build("map")
  encoder.text = text
  return encoder, data


@pytest.mark.parametrize("average", ["softmax", "scores"])
def test_colours_are_segmented(colour_blocks, average):
  encoder, _ = colour_blocks
  result = ZeroShotSegmentation(
    data="blocks", size=48, average=average, pictures=2
  ).run(encoder)
  assert result.metrics["miou"] > 0.85
  assert result.metrics["aacc"] > 0.9
  assert result.chance["macc"] == pytest.approx(1 / 3)
  protocol = json.loads(json.dumps(result.protocol))
  assert protocol["preprocess"]["stride"] == 36
  assert protocol["preprocess"]["interpolation"].startswith("bicubic")
  assert protocol["templates"] == list(prompts.DEFAULT_TEMPLATES)
  assert protocol["last_block"] == "attention"
  assert result.sheets["zero_shot_segmentation"].dtype == np.uint8


def test_prompt_files_are_in_the_order_of_the_labels(colour_blocks, tmp_path):
  encoder, data = colour_blocks
  path = tmp_path / "prompts.json"
  # Red and green are swapped, so that only blue is correct.
  path.write_text(json.dumps({"classes": ["green", "red", "blue"]}))
  options = {"data": "blocks", "size": 48, "prompts": str(path)}
  result = ZeroShotSegmentation(**options).run(encoder)
  assert result.errors.keys() == result.metrics.keys()
  share = np.mean([data.maps[i] == 2 for i in range(4)])
  assert result.metrics["aacc"] == pytest.approx(share, abs=0.08)
  path.write_text(json.dumps({"classes": ["green", "red"]}))
  with pytest.raises(ValueError, match="names 2 classes, but the data has 3"):
    ZeroShotSegmentation(**options).prepare()


def test_published_values(colour_blocks):
  encoder, _ = colour_blocks
  slide = ZeroShotSegmentation(data="blocks")._build_slide(encoder)
  assert (slide.size, slide.stride, slide.short) == (448, 336, 448)
  assert (slide.interpolation, slide.average) == ("bicubic", "softmax")


@pytest.mark.slow
def test_scenes_on_one_device_and_eight():
  metrics = [
    ZeroShotSegmentation(count=12, encode_batch=len(devices) + 3)
    .run(build("map", devices=devices))
    .metrics
    for devices in (jax.devices()[:1], jax.devices())
  ]
  for name, value in metrics[0].items():
    assert metrics[1][name] == pytest.approx(value, abs=2e-3)
