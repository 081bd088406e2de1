"""Preprocess: Pillow's resampling, transformers' processors, big_vision's."""

import numpy as np
import PIL.Image
import pytest

from mtv_jax.config import sections
from mtv_jax.convert.processors import write_processor
from mtv_jax.encoder.preprocess import Preprocess, preprocess_from_config
from mtv_jax.models.two_tower import ModelConfig

CLIP = {
  "mean": (0.48145466, 0.4578275, 0.40821073),
  "std": (0.26862954, 0.26130258, 0.27577711),
}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SIZES = [(50, 71), (71, 50), (20, 20), (224, 301), (37, 224)]


def random_images():
  rng = np.random.default_rng(0)
  for size in SIZES:
    coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
    image = PIL.Image.fromarray(coarse).resize(size[::-1])
    yield np.asarray(image)


def test_squash_and_scale():
  image = np.zeros((10, 20, 3), np.uint8)
  image[..., 0], image[..., 1] = 255, 51
  out = Preprocess(size=4)(image)
  assert out.shape == (4, 4, 3)
  assert out.dtype == np.float32
  np.testing.assert_allclose(out[0, 0], [1.0, -0.6, -1.0], atol=1e-6)


def test_pil_and_array_agree():
  image = next(random_images())
  preprocess = Preprocess(size=16, interpolation="bicubic")
  grey = PIL.Image.fromarray(image).convert("L")
  np.testing.assert_array_equal(
    preprocess(PIL.Image.fromarray(image)), preprocess(image)
  )
  assert preprocess(grey).shape == (16, 16, 3)


def test_without_antialias_two_neighbours_are_read():
  """A step of 1, 0, 1, 0: no average, the pixel under the centre."""
  ramp = np.repeat(np.arange(8, dtype=np.uint8)[None] * 30, 8, axis=0)
  image = np.repeat(ramp[..., None], 3, axis=-1)
  preprocess = Preprocess(
    size=2, antialias=False, mean=(0.0,) * 3, std=(1.0,) * 3
  )
  # Centres at 0.25 and 0.75 of 8 pixels (1.5 and 5.5): means of two neighbours.
  want = np.array([1.5, 5.5]) * 30 / 255
  np.testing.assert_allclose(preprocess(image)[0, :, 0], want, atol=1e-6)
  # Fractions are cut: 0.5 of 255 is 127.
  halves = np.tile(np.uint8([0, 255])[:, None], (4, 4, 3))
  np.testing.assert_allclose(preprocess(halves), 127 / 255, atol=1e-6)
  white = np.full((9, 9, 3), 255, np.uint8)
  assert (Preprocess(size=7, antialias=False)(white) == 1).all()


def test_center_crop_of_the_shorter_side():
  image = np.zeros((40, 80, 3), np.uint8)
  image[:, 20:60] = 255
  out = Preprocess(size=20, resize="shortest", crop="center")(image)
  assert out.shape == (20, 20, 3)
  assert out[:, 2:-2].min() == 1.0


def test_dict_round_trip_and_mistakes():
  options = dict(resize="shortest", crop="center", resize_size=32)
  preprocess = Preprocess(size=24, **options)
  assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
  for fields, message in (
    ({"crop_size": 2}, "'crop_size'"),
    ({"resize": "stretch"}, "There are"),
    ({"resize": "shortest"}, "different shapes"),
    ({"resize": "native"}, "needs patch_size and max_patches"),
    ({"resize_size": 32}, "needs crop='center'"),
    ({"crop": "center", "resize_size": 20}, "smaller than the crop"),
  ):
    with pytest.raises(ValueError, match=message):
      Preprocess.from_dict({"size": 24, **fields})


def test_preprocess_of_a_config():
  def read(ops=None, **model):
    model = sections.read(ModelConfig, model, "config.model")
    views = {"image": {"count": 1, "ops": ops}} if ops else {}
    return preprocess_from_config(model, views)

  assert read(image_size=224) == Preprocess(size=224)
  assert read("resize(64)", image_size=224).size == 64
  # The pixel statistics reach the encoder and the exports' processor.
  statistics = dict(image_mean=list(IMAGENET["mean"]), image_std=0.25)
  preprocess = read("resize(64)", **statistics)
  assert preprocess.mean == IMAGENET["mean"]
  assert preprocess.std == (0.25, 0.25, 0.25)
  written = write_processor(preprocess.to_dict(), 64, "Siglip", {})
  assert written["image_mean"] == list(IMAGENET["mean"])
  assert written["image_std"] == [0.25, 0.25, 0.25]
  # The view's kernel too.
  ops = "crop(64, 0.32, 1.0, method='bicubic')"
  assert read(ops).interpolation == "bicubic"
  for key, value in (("image_mean", 123.7), ("image_std", [58.4, 57.1, 57.4])):
    with pytest.raises(ValueError, match=f"{key} is .*by 255"):
      read(image_size=64, **{key: value})


@pytest.mark.reference
def test_equals_transformers():
  transformers = pytest.importorskip("transformers")
  square = {"height": 32, "width": 32}
  siglip = transformers.SiglipImageProcessorPil(size=square)
  crop = {"crop_size": {"height": 28, "width": 28}}
  size = {"shortest_edge": 28}
  clip = transformers.CLIPImageProcessorPil(size=size, **crop)
  statistics = {f"image_{k}": list(v) for k, v in IMAGENET.items()}
  dino = transformers.BitImageProcessorPil(
    size={"shortest_edge": 36}, resample=3, **crop, **statistics
  )
  shortest = dict(resize="shortest", crop="center", interpolation="bicubic")
  pairs = [
    (siglip, Preprocess(size=32, interpolation="bicubic")),
    (clip, Preprocess(size=28, **shortest, **CLIP)),
    (dino, Preprocess(size=28, resize_size=36, **shortest, **IMAGENET)),
  ]
  for theirs, ours in pairs:
    for image in random_images():
      want = theirs(PIL.Image.fromarray(image), return_tensors="np")
      want = want["pixel_values"][0].transpose(1, 2, 0)
      np.testing.assert_array_equal(ours(image), want)
