"""Encoder features that probes read, and probes' views of an image."""

import dataclasses

import family_specs
import numpy as np
import PIL.Image
import pytest
import tower_parity as parity
from random_trees import random_params

import mtv_jax
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.classification import few_shot, probe_evaluators
from mtv_jax.evals.core import examples, global_features
from mtv_jax.evals.core.examples import ClassificationSet, LazySequence
from mtv_jax.models import two_tower as models
from mtv_jax.models.vit import ViTSpec

TOWER = dict(image_size=16, patch_size=8, width=16, depth=3, heads=2, mlp_dim=8)


def make(**fields):
  spec = models.ModelSpec(image=ViTSpec(**TOWER, **fields))
  return Encoder(spec, random_params(spec, std=0.3), Preprocess(size=16))


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(1)
  return [rng.integers(0, 256, (20, 30, 3), np.uint8) for _ in range(3)]


@pytest.fixture(scope="module")
def cls():
  return make(pool="cls", cls_token=True, registers=1)


def normed(x, encoder):
  norm = encoder.params["image"]["norm"]
  x = np.asarray(x, float)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
    x.var(-1, keepdims=True) + encoder.spec.image.norm_eps
  )
  return x * np.asarray(norm["scale"]) + np.asarray(norm["bias"])


def test_last_blocks_of_a_tower_with_a_class_token(cls, images, monkeypatch):
  want = cls.image(images, layers=(0, 1))
  # One chunk per image.
  monkeypatch.setattr(global_features, "_CHUNK_BYTES", 1)
  got = global_features.last_blocks(
    cls, labelled(images), blocks=3, batch_size=1
  )
  assert len(got.tokens) == 3
  np.testing.assert_allclose(got.tokens[0], want.prefix[:, 0], atol=1e-5)
  for token, layer in ((got.tokens[1], 1), (got.tokens[2], 0)):
    token_before = want.prefix_layers[layer][:, 0]
    np.testing.assert_allclose(token, normed(token_before, cls), atol=1e-4)
  mean = want.patches.mean(axis=(1, 2))
  np.testing.assert_allclose(got.mean, mean, atol=1e-5)
  assert np.abs(got.tokens[1] - got.tokens[2]).max() > 0.1


@pytest.mark.slow
def test_last_blocks_of_a_tower_without(images):
  encoder = make(pool="map")
  want = encoder.image(images, layers=(1,))
  got = global_features.last_blocks(encoder, labelled(images), blocks=2)
  np.testing.assert_allclose(got.tokens[0], want.pooled, atol=1e-5)
  second = normed(want.layers[1], encoder).mean(axis=(1, 2))
  np.testing.assert_allclose(got.tokens[1], second, atol=1e-4)
  assert "mean patch" in global_features.describe_tokens(encoder)
  with pytest.raises(ValueError, match="no CLS token"):
    global_features.embed(encoder, labelled(images), feature="cls")


# One family for each kind of token and of final norm.
FAMILIES = {
  (s.get("pool") == "cls", s.get("final_norm"), s.get("norm_kind")): kind
  for kind, s in family_specs.SPECS.items()
}


@pytest.mark.parametrize("kind", FAMILIES.values())
def test_earlier_blocks_pass_the_norm_of_every_family(kind, images):
  """For the last block, the result is the tower's own output."""
  spec = models.ModelSpec.from_config(family_specs.SPECS[kind])
  preprocess = Preprocess(size=64)
  encoder = Encoder(spec, parity.random_params(spec), preprocess)
  out = encoder.image(images, layers=(0, 1), outputs=("patches",))
  got = global_features.final_norm(encoder, out.layers[1])
  np.testing.assert_allclose(got, out.patches, atol=1e-4)
  blocks = global_features.last_blocks(encoder, labelled(images), blocks=2)
  first = out.layers[0].mean(axis=(1, 2))
  if spec.image.cls_token:
    first = encoder.image(images, layers=(0,)).prefix_layers[0][:, 0]
  assert (np.abs(blocks.tokens[1] - first).max() > 0.01) == (
    spec.image.final_norm
  )
  kinds = global_features.describe_tokens(encoder)
  assert ("final norm" in kinds) == spec.image.final_norm


def test_means_of_native_images_leave_out_padding():
  rng = np.random.default_rng(2)
  images = [
    rng.integers(0, 256, s, np.uint8) for s in ((9, 40, 3), (20, 20, 3))
  ]
  encoder = make(pool="mean", position_resize="bilinear_antialiased")
  preprocess = Preprocess(16, "native", patch_size=8, max_patches=5)
  encoder = encoder.with_preprocess(preprocess)
  got = global_features.last_blocks(encoder, labelled(images), blocks=2)
  for i, grid in enumerate(((1, 5), (2, 2))):
    image = images[i]
    alone = encoder.dense((encoder.preprocess(image)[None] + 1) * 127.5)
    assert alone.patches.shape[1:3] == grid
    mean = alone.patches.mean(axis=(1, 2))[0]
    np.testing.assert_allclose(got.mean[i], mean, atol=1e-4)
  mean = global_features.embed(encoder, labelled(images), feature="mean")
  np.testing.assert_allclose(mean, got.mean, atol=1e-5)


def labelled(images):
  return ClassificationSet(
    name="x",
    images=LazySequence(lambda i: images[i], len(images)),
    labels=np.zeros(len(images), np.int32),
    classes=None,
    ids=None,
    digest=examples.hash_rows([map(np.ndarray.tobytes, images)]),
  )


@pytest.mark.parametrize("feature", ["pooled", "cls", "mean"])
def test_embed(cls, images, feature):
  want = cls.image(images)
  want = {
    "pooled": want.pooled,
    "cls": want.prefix[:, 0],
    "mean": want.patches.mean(axis=(1, 2)),
  }[feature]
  got = global_features.embed(cls, labelled(images), feature=feature)
  np.testing.assert_allclose(got, want, atol=1e-5)
  # Also for pixels that already have the target size.
  small = [np.asarray(PIL.Image.fromarray(i).resize((16, 16))) for i in images]
  got = global_features.embed(
    cls, labelled(small), feature=feature, pixels="crops"
  )
  want = global_features.embed(
    cls, dataclasses.replace(labelled(small), digest="y"), feature=feature
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_views(cls):
  assert global_features.with_view(cls, "encoder") is cls
  centered = global_features.with_view(cls, "center")
  assert centered is global_features.with_view(cls, "center")
  assert centered.params is cls.params
  # Only the centre of a wide image.
  image = np.zeros((18, 36, 3), np.uint8)
  image[:, :9] = image[:, -9:] = 255
  assert cls.preprocess(image).max() == 1
  assert centered.preprocess(image).max() < 0
  for size, resized in ((224, 256), (256, 292), (384, 438)):
    encoder = mtv_jax.load(f"pixels:{size}")
    preprocess = global_features.with_view(encoder, "center").preprocess
    assert preprocess.resize_size == resized
    assert preprocess.interpolation == "bicubic"
  full = global_features.with_view(encoder, "shortest").preprocess
  assert full == dataclasses.replace(preprocess, resize_size=384)
  # A view follows later changes of the encoder's preprocessing.
  other = dataclasses.replace(encoder.preprocess, mean=(0.1, 0.2, 0.3))
  encoder.preprocess = other
  got = global_features.with_view(encoder, "center").preprocess.mean
  assert (got, preprocess.mean) == (other.mean, (0.5, 0.5, 0.5))


@pytest.mark.reference
def test_the_centre_equals_torchvision():
  from torchvision import transforms

  rng = np.random.default_rng(0)
  reference = transforms.Compose(
    [
      transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
      transforms.CenterCrop(28),
    ]
  )
  encoder = mtv_jax.load("pixels:28/4")
  center = global_features.with_view(encoder, "center").preprocess
  moved = 0
  for _ in range(40):
    height, width = rng.integers(30, 120, 2)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    want = np.asarray(reference(PIL.Image.fromarray(image)))
    got = np.rint((center(image) + 1) * 127.5)
    np.testing.assert_array_equal(got, want)
    down = dataclasses.replace(center, crop_rounding="down")
    encoder.preprocess = down
    view = global_features.with_view(encoder, "open_clip")
    np.testing.assert_array_equal(view.preprocess(image), center(image))
    moved += not np.array_equal(down(image), center(image))
  assert 2 < moved < 20


def halfway(x, size):
  """Bilinear along the first axis, half-pixel centres, two neighbours."""
  at = (np.arange(size) + 0.5) * len(x) / size - 0.5
  low = np.floor(at).astype(int)
  share = (at - low).reshape(-1, *[1] * (x.ndim - 1))
  below, above = (np.clip(low + i, 0, len(x) - 1) for i in (0, 1))
  return x[below] * (1 - share) + x[above] * share


@pytest.mark.parametrize(
  "size, resized, name",
  [(28, 32, "few_shot"), (24, 27, "few_shot"), (24, 24, "squash")],
)
def test_few_shot_and_retrieval_see_what_big_vision_shows(size, resized, name):
  """resize(256)|central_crop(224) in proportion, or resize(224)."""
  if name == "few_shot":
    name = few_shot.FewShot(data="elsewhere")._resolve_view()
    assert name == "squash_center"
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (90, 150, 3), np.uint8)
  want = halfway(image.astype(float), resized)
  want = halfway(want.swapaxes(0, 1), resized).swapaxes(0, 1)
  start = (resized - size) // 2
  want = want[start : start + size, start : start + size]
  encoder = mtv_jax.load(f"pixels:{size}/4")
  # big_vision casts the result of the resize to bytes, which cuts fractions.
  view = global_features.with_view(encoder, name)
  got = (view.preprocess(image) + 1) * 127.5
  np.testing.assert_allclose(got, np.floor(want + 1e-3), atol=1e-3)
  assert few_shot.FewShot()._resolve_view() == "encoder"


def test_crops():
  rng = np.random.default_rng(0)
  boxes = [probe_evaluators.crop_box(60, 100, rng) for _ in range(2000)]
  width = np.array([b[2] - b[0] for b in boxes])
  height = np.array([b[3] - b[1] for b in boxes])
  assert min(min(b) for b in boxes) == 0
  assert max(b[2] for b in boxes) == 100 and max(b[3] for b in boxes) == 60
  area, ratio = width * height / 6000, width / height
  # Up to rounding of a side; the smallest has 19 pixels.
  assert 0.075 < area.min() < 0.1 and 0.7 < area.max() <= 0.85
  assert 0.7 < ratio.min() < 0.78 and 1.3 < ratio.max() < 1.4
  assert abs(np.log(ratio[area < 0.4]).mean()) < 0.03
  # MAE's are clamped, which are larger.
  clamped = [
    probe_evaluators.crop_box(375, 500, rng, redraw=False) for _ in range(4000)
  ]
  area = [(b[2] - b[0]) * (b[3] - b[1]) / (375 * 500) for b in clamped]
  assert np.mean(area) == pytest.approx(0.519, abs=0.01)
  # No crop of this strip fits: the fallback is the centre, at 4 : 3.
  box = probe_evaluators.crop_box(3, 300, np.random.default_rng(0))
  assert box == (148, 0, 152, 3)
  image = np.zeros((8, 8, 3), np.uint8)
  image[:, :4] = 200
  cropped = [
    probe_evaluators.random_crop(image, size=6, rng=rng) for _ in range(60)
  ]
  left = sum(int(c[:, 0].mean() > c[:, -1].mean()) for c in cropped)
  right = sum(int(c[:, 0].mean() < c[:, -1].mean()) for c in cropped)
  assert {c.shape for c in cropped} == {(6, 6, 3)}
  assert left > 10 and right > 10
