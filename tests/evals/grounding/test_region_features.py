"""Regions of real encoders: crops, pooled patches and the prompter's."""

import jax
import numpy as np
import pytest
from random_trees import random_leaves, random_params

from mtv_jax.data import tokenizers
from mtv_jax.data.scenes import render as scenes
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals import grounding
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.grounding import GroundingEvaluator
from mtv_jax.models import heads as heads_lib
from mtv_jax.models import two_tower as models
from mtv_jax.objectives import build_objective
from mtv_jax.parallel.mesh import make_mesh


def tower(**image):
  shape = {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64}
  return models.ModelSpec.from_config(
    {
      "image_size": 32,
      "patch_size": 8,
      **shape,
      **image,
      "text": {"length": 12, "vocab_size": 258, **shape},
    }
  )


def build(spec, *, devices=None, params=None, **kwargs):
  return Encoder(
    spec,
    params or random_params(spec),
    kwargs.pop("preprocess", Preprocess(size=32)),
    tokenizers.build_tokenizer("bytes", clean="lower"),
    make_mesh({"data": -1}, devices),
    **kwargs,
  )


MEAN = tower(pool="mean", projection=16)


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(9)
  return list(rng.integers(0, 256, (3, 40, 48, 3), np.uint8))


WHOLE = [np.float32([[0, 0, 1, 1]])] * 3


@pytest.mark.parametrize("method", ["pool", "crop"])
def test_a_box_of_the_whole_image_equals_the_image(method, images):
  encoder = build(MEAN)
  got = grounding.embed_regions(encoder, images, WHOLE, method=method)
  want = encoder.image(images, outputs=("pooled",)).pooled
  np.testing.assert_allclose(got, normalize(want), atol=1e-5)


def test_pooled_patches_are_weighted_by_area(images):
  encoder = build(MEAN)
  # Rows 0..1.5 of 4, columns 1..2.
  boxes = [np.float32([[0, 0.25, 0.375, 0.5]])] * 3
  got = grounding.embed_regions(encoder, images, boxes, method="pool")
  patches = encoder.image(images, outputs=("patches",)).patches
  want = (patches[:, 0, 1] + 0.5 * patches[:, 1, 1]) / 1.5
  want = want @ random_params(MEAN)["image"]["projection"]["kernel"]
  np.testing.assert_allclose(got, normalize(want), atol=1e-5)


def test_crops_are_warped_for_every_preprocessing(images):
  boxes = [np.float32([[0.1, 0.5, 0.9, 0.625], [0, 0, 0.01, 0.01]])] * 3
  centred = Preprocess(size=32, resize="shortest", crop="center")
  got = grounding.embed_regions(
    build(MEAN, preprocess=centred), images, boxes, method="crop"
  )
  encoder = build(MEAN)
  cuts = [images[0][4:36, 24:30], images[0][:1, :1]]
  want = normalize(encoder.image(cuts, outputs=("pooled",)).pooled)
  np.testing.assert_allclose(got[:2], want, atol=1e-5)


def test_native_images_are_squashed(images):
  mean = tower(
    pool="mean", projection=16, position_resize="bilinear_antialiased"
  )
  native = Preprocess(32, "native", patch_size=8, max_patches=16)
  boxes = [np.float32([[0.1, 0.5, 0.9, 0.625]])] * 3
  for method in ("pool", "crop"):
    got, want = (
      grounding.embed_regions(
        build(mean, preprocess=preprocess), images, boxes, method=method
      )
      for preprocess in (native, Preprocess(size=32))
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_protocol_of_the_preprocessing():
  """For an encoder that crops, only mean and standard deviation apply."""
  cropping = Preprocess(
    size=32,
    resize="shortest",
    crop="center",
    resize_size=36,
    mean=(0.4, 0.5, 0.6),
  )
  encoder = build(MEAN, preprocess=cropping)
  evaluator = GroundingEvaluator(count=2, locate="none", regions="pool")
  pooled = evaluator.run(encoder).protocol["preprocess"]
  cropped = grounding.regions_preprocess(encoder, "crop")["preprocess"]
  squashed = {"resize": "squash", "crop": "none", "resize_size": None}
  assert pooled == {**cropping.to_dict(), **squashed, "of": "the whole image"}
  assert cropped == {**cropping.to_dict(), **squashed, "of": "the box's pixels"}
  # The prompter and the encoder read equal inputs.
  prompted = grounding.regions_preprocess(build(MEAN), "prompter")["preprocess"]
  assert prompted == {**Preprocess(size=32).to_dict(), "of": "the whole image"}


def test_covered():
  got = grounding.covered(
    np.float32([0, 0.3, 0.5, 1.0]), np.float32([1, 0.6, 0.5, 1.0]), 4
  )
  np.testing.assert_array_equal(got[0], [1, 1, 1, 1])
  np.testing.assert_allclose(got[1], [0, 0.8, 0.4, 0], atol=1e-5)
  assert (got.sum(axis=1) > 0).all()
  assert got[2].argmax() == 2
  assert got[3].argmax() == 3


def test_resolve(with_heads):
  plain = build(tower())
  assert grounding.resolve_regions(plain, "auto") == "crop"
  assert grounding.resolve_regions(with_heads(), "auto") == "prompter"
  with pytest.raises(NotApplicable, match="no prompter.*regions='crop'"):
    grounding.resolve_regions(plain, "prompter")
  with pytest.raises(NotApplicable, match="pools by 'map'"):
    grounding.resolve_regions(plain, "pool")
  assert grounding.resolve_regions(build(MEAN), "pool") == "pool"


# ---------------------------------------------------------------------------
# On the built-in scenes, with a real encoder.


@pytest.fixture(scope="module")
def with_heads():
  """An encoder with prompter and locator, by its devices."""
  spec = tower()
  entry = {"regression": 1.0}
  objective = build_objective("grounding", entry).resolve(spec, {})
  heads = random_leaves(
    {
      name: jax.eval_shape(lambda h=head: h.init(jax.random.key(0), spec))
      for name, head in objective.heads().items()
    },
    seed=10,
  )
  params = {**random_params(spec), "heads": heads}
  described = heads_lib.heads_of_config({"grounding": entry}, spec)

  def build_encoder(devices=None):
    return build(
      spec, devices=devices, params=params, prediction_heads=described
    )

  return build_encoder


@pytest.mark.slow
def test_scenes(with_heads):
  result = GroundingEvaluator(count=6).run(with_heads())
  assert {"located_iou50", "box_top1"} <= result.metrics.keys()
  assert result.chance["box_top1"] == pytest.approx(1 / len(scenes.CLASS_NAMES))
  assert result.protocol["images"] == 6
  # The boxes belong to scenes beyond any training run.
  want = scenes.render(1_000_000)
  data = registry.open_boxes("scenes", count=6)
  np.testing.assert_array_equal(data.boxes[0], want.boxes)
  assert data.phrases[0] == want.phrases
  for phrase, label in zip(data.phrases[0], data.labels[0], strict=True):
    assert data.classes[label] in phrase
