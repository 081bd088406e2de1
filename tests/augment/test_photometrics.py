"""Photometric ops against colorsys, NumPy and torchvision."""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.augment import photometrics
from mtv_jax.augment.op import OPS as REGISTRY

NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}

OPS = [
  photometrics.Jitter(0.3),
  photometrics.Grey(0.3),
  photometrics.Blur(0.3, sigma=(0.5, 2.0)),
  photometrics.Solarize(0.3),
]


def pixels(size=24, seed=0):
  """An image `[3, size, size]` with greys, blacks, whites and pure colours."""
  image = np.random.default_rng(seed).random((3, size, size), np.float32)
  image[:, 0] = image[:1, 0]
  image[:, 1], image[:, 2] = 0.0, 1.0
  image[:, 3] = np.round(image[:, 3])
  return image


def channels(image):
  return tuple(jnp.asarray(image))


@pytest.fixture(scope="module")
def jitter():
  """`jitter_colour` of `[3, h, w]` with plain numbers, compiled once."""
  compiled = jax.jit(photometrics.jitter_colour)

  def call(image, *, positions=(0, 1, 2, 3), **factors):
    factors = {k: jnp.float32(v) for k, v in (NEUTRAL | factors).items()}
    out = compiled(channels(image), positions=jnp.asarray(positions), **factors)
    return np.stack(out)

  return call


@pytest.mark.parametrize("shift", [0.0, 0.1, -0.1, 0.37, 0.5, -0.5])
def test_hue_agrees_with_colorsys(shift):
  image = pixels()
  got = np.stack(photometrics.shift_hue(channels(image), jnp.float32(shift)))
  want = np.empty_like(image)
  for y, x in np.ndindex(image.shape[1:]):
    h, s, v = colorsys.rgb_to_hsv(*image[:, y, x].astype(float))
    want[:, y, x] = colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_neutral_factors_are_the_identity(jitter):
  image = pixels()
  np.testing.assert_allclose(jitter(image), image, atol=1e-6)


def test_each_factor_blends_with_its_image(jitter):
  image = pixels()
  grey = np.einsum("c,chw->hw", [0.2989, 0.587, 0.114], image)
  for factor in (0.0, 0.6, 1.4):
    for name, other in [
      ("brightness", 0.0),
      ("contrast", grey.mean()),
      ("saturation", grey),
    ]:
      want = np.clip(factor * image + (1 - factor) * other, 0, 1)
      np.testing.assert_allclose(
        jitter(image, **{name: factor}), want, atol=1e-5
      )


@pytest.mark.reference
def test_jitter_agrees_with_torchvision_in_every_order(jitter):
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("torchvision.transforms.functional")
  steps = [
    ("brightness", functional.adjust_brightness),
    ("contrast", functional.adjust_contrast),
    ("saturation", functional.adjust_saturation),
    ("hue", functional.adjust_hue),
  ]
  rng = np.random.default_rng(0)
  for seed, order in enumerate(itertools.permutations(range(4))):
    image = pixels(seed=seed)
    factors = {
      "brightness": rng.uniform(0.6, 1.4),
      "contrast": rng.uniform(0.6, 1.4),
      "saturation": rng.uniform(0.8, 1.2),
      "hue": rng.uniform(-0.1, 0.1),
    }
    want = torch.from_numpy(image)
    for i in order:
      name, step = steps[i]
      want = step(want, factors[name])
    got = jitter(image, positions=np.argsort(order), **factors)
    np.testing.assert_allclose(got, want.numpy(), atol=2e-5)


@pytest.mark.reference
def test_grey_and_solarize_agree_with_torchvision():
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("torchvision.transforms.functional")
  image = pixels()
  reference = torch.from_numpy(image)
  u = jnp.zeros(1)
  grey = photometrics.Grey(p=1.0)(channels(image), u, jnp.float32)
  want = functional.rgb_to_grayscale(reference, num_output_channels=3)
  np.testing.assert_allclose(np.stack(grey), want.numpy(), atol=1e-6)
  solar = photometrics.Solarize(p=1.0)(channels(image), u, jnp.float32)
  want = functional.solarize(reference, 128 / 255)
  np.testing.assert_allclose(np.stack(solar), want.numpy(), atol=1e-6)


def test_solarize_inverts_bright_bytes_only():
  values = np.arange(256, dtype=np.float32).reshape(16, 16)
  got = photometrics.solarize(channels(np.stack([values / 255] * 3)), 128)
  want = np.where(values >= 128, 255 - values, values)
  np.testing.assert_allclose(np.asarray(got[0]) * 255, want, atol=1e-4)


@pytest.mark.reference
@pytest.mark.parametrize("size", [5, 24])
def test_blur_agrees_with_torchvision(size):
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("torchvision.transforms.functional")
  image = pixels(size)
  for sigma in (0.1, 0.7, 2.0):
    want = functional.gaussian_blur(
      torch.from_numpy(image), [9, 9], [sigma, sigma]
    )
    got = photometrics.gaussian_blur(
      channels(image), jnp.float32(sigma), kernel=9
    )
    np.testing.assert_allclose(np.stack(got), want.numpy(), atol=2e-6)


def test_blur_in_bfloat16_rounds_by_less_than_a_level():
  image = pixels(64)
  exact, rounded = (
    np.stack(
      photometrics.gaussian_blur(
        channels(image), jnp.float32(1.0), kernel=9, dtype=dtype
      )
    )
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert 255 * np.abs(exact - rounded).mean() < 0.25


def test_sampled_factors_are_uniform_in_their_ranges():
  op = photometrics.Jitter(p=1.0, brightness=1.4, hue=0.1)
  u = np.random.default_rng(0).random((4000, 9), np.float32)
  sampled = jax.jit(jax.vmap(op.sample_factors))(jnp.asarray(u))
  ranges = {
    "brightness": (0.0, 2.4),
    "contrast": (0.6, 1.4),
    "saturation": (0.8, 1.2),
    "hue": (-0.1, 0.1),
  }
  for name, (low, high) in ranges.items():
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
      expected = low + share * (high - low)
      got = np.quantile(sampled[name], share)
      assert abs(got - expected) < 0.03 * (high - low), name
  orders, counts = np.unique(sampled["positions"], axis=0, return_counts=True)
  assert len(orders) == 24
  # Four standard deviations around 4000 / 24.
  assert np.abs(counts - 4000 / 24).max() < 4 * np.sqrt(4000 / 24)


@pytest.mark.parametrize("op", OPS)
def test_ops_are_applied_with_their_probability(op):
  image = channels(pixels(6))
  u = np.random.default_rng(0).random((3000, op.num_uniforms(6)), np.float32)
  out = jax.jit(jax.vmap(lambda u: jnp.stack(op(image, u, jnp.float32))))(u)
  change = np.abs(np.asarray(out) - np.stack(image)).max(axis=(1, 2, 3))
  # Unchanged images are equal up to rounding.
  assert abs((change > 1e-4).mean() - 0.3) < 0.03
  assert ((change > 1e-4) | (change < 3e-6)).all()


def test_two_ops_of_a_name_are_rejected():
  with pytest.raises(TypeError, match="'blur' already exists"):

    class Sharpen(photometrics.PhotometricOp, name="blur"):
      pass

  assert REGISTRY["blur"] is photometrics.Blur
