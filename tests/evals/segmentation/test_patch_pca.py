"""Principal components of patches: against SVD."""

import numpy as np
import PIL.Image
import pytest
from random_trees import random_params

from mtv_jax.encoder import baselines
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import ImageFeatures
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.segmentation import patch_pca
from mtv_jax.evals.segmentation.patch_pca import PatchPca
from mtv_jax.models import two_tower as models
from mtv_jax.utils import plots

HEAD = plots.SHEET_LINE + 5  # of a sheet's columns


def patches_of(seed=0, shape=(3, 4, 5, 7)):
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(shape[-1], shape[-1]))
  return (rng.normal(size=shape) @ mixed + 3).astype(np.float32)


def test_components_against_svd():
  patches = patches_of()
  mask = np.random.default_rng(1).random(patches.shape[:3]) < 0.7
  got = patch_pca.principal_components(patches, mask=mask)
  rows = patches[mask].astype(np.float64)
  centred = rows - rows.mean(axis=0)
  _, values, vectors = np.linalg.svd(centred, full_matrices=False)
  want = (patches - rows.mean(axis=0)) @ vectors[:3].T
  signs = np.sign((want * got.components).sum(axis=(0, 1, 2)))
  np.testing.assert_allclose(got.components, want * signs, atol=1e-4)
  np.testing.assert_allclose(
    got.share, (values**2 / (values**2).sum())[:3], rtol=1e-5
  )
  # The sign depends on the features, not on the solver.
  again = patch_pca.principal_components(-patches, mask=mask)
  np.testing.assert_allclose(again.components, -got.components, atol=1e-4)


def test_fewer_features_than_components():
  patches = patches_of(shape=(2, 3, 3, 2))
  mask = np.ones((2, 3, 3), bool)
  got = patch_pca.principal_components(patches, mask=mask)
  assert got.components.shape == (2, 3, 3, 3)
  assert not got.components[..., 2].any()
  assert got.share.sum() == pytest.approx(1)
  with pytest.raises(ValueError, match="not finite"):
    patch_pca.principal_components(patches * np.nan, mask=mask)


def test_foreground_is_what_the_border_is_not():
  patches = np.random.default_rng(0).normal(0, 0.01, (2, 6, 6, 4))
  patches[:, 2:4, 2:4] += [5, -3, 0, 1]
  for sign in (1, -1):
    inside = patch_pca.find_foreground((sign * patches).astype(np.float32))
    assert inside[:, 2:4, 2:4].all() and inside.sum() == 8


def test_colours_share_a_scale():
  components = np.zeros((2, 2, 2, 3), np.float32)
  components[0, 0, 0] = 100
  components[1, 1] = 50
  mask = np.ones((2, 2, 2), bool)
  mask[1, 0, 0] = False
  colours = patch_pca.component_colours(components, mask)
  assert (colours[0, 0, 0] == 255).all() and (colours[1, 0, 0] == 0).all()
  assert (colours[1, 1] > 100).all() and (colours[1, 1] < 160).all()
  assert not patch_pca.component_colours(components, mask & False).any()


class PatchEncoder(Encoder):
  """Patches are the pixels of a 4 x 4 thumbnail; a layer is their double."""

  def __init__(self):
    self.preprocess = Preprocess(size=4)

  def image(self, images, *, layers=(), outputs=(), batch_size=64):
    rows = [
      np.asarray(PIL.Image.fromarray(images[i]).resize((4, 4)), np.float32)
      for i in range(len(images))
    ]
    patches = np.stack(rows)
    return ImageFeatures(
      None,
      patches if outputs else None,
      None,
      dict.fromkeys(layers, 2 * patches),
    )

  def protocol(self):
    return {"encoder": "thumbnails"}


def test_a_sheet_is_drawn_on_request():
  result = PatchPca(count=4).run(PatchEncoder())
  assert result.sheets == {}
  # Three components explain all of three channels.
  assert result.metrics["explained_by_3"] == pytest.approx(1)
  assert result.errors["explained_by_3"] == pytest.approx(0, abs=1e-6)
  assert result.protocol["final_norm"] is True
  assert result.protocol["grid"] == [4, 4] and result.protocol["images"] == 4
  result = PatchPca(count=4, layer=-2, pictures=3).run(PatchEncoder())
  assert result.protocol["layer"] == -2 and not result.protocol["final_norm"]
  sheet = result.sheets["pca"]
  assert sheet.dtype == np.uint8 and sheet.shape == (
    HEAD + 3 * 280 - 8,
    2 * 280 - 8,
    3,
  )


def test_error_of_the_share_is_that_of_fresh_images():
  rng = np.random.default_rng(0)

  def sample(images=12):
    scale = np.linspace(2, 1, 6) * rng.lognormal(0, 0.4, (images, 1, 1, 6))
    x = rng.normal(size=(images, 4, 4, 6)) * scale
    return x.astype(np.float32)

  mask = np.ones((12, 4, 4), bool)
  shares = [
    patch_pca.principal_components(sample(), mask=mask).share.sum()
    for _ in range(300)
  ]
  errors = [patch_pca.share_error(sample(), mask=mask) for _ in range(60)]
  assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.2)
  assert patch_pca.share_error(sample(1), mask=mask[:1]) is None


def test_any_folder_of_photos(tmp_path, write_image):
  write_image(tmp_path / "photos" / "a" / "b" / "0.jpg", "red")
  write_image(tmp_path / "photos" / "1.jpg", "blue")
  data = str(tmp_path / "photos")
  result = PatchPca(data=data, pictures=2).run(PatchEncoder())
  assert result.protocol["images"] == 2
  # Both photos are 12 x 8, and so are their colours.
  sheet = result.sheets["pca"]
  sheet = sheet[HEAD:]
  assert (sheet[:20, :272] == 255).all() and (sheet[:20, 280:552] == 255).all()
  assert not (sheet[136, 280:552] == 255).all()
  (tmp_path / "none").mkdir()
  with pytest.raises(NotApplicable, match="no images in"):
    PatchPca(data=str(tmp_path / "none")).prepare()


def test_inputs_of_another_size():
  evaluator = PatchPca(count=5, size=24, pictures=2)
  protocol = evaluator.run(baselines.PixelEncoder(16, 8)).protocol
  assert protocol["grid"] == [3, 3]
  # Only mean and std of the encoder's own preprocessing apply.
  assert protocol["input_size"] == [24, 24]
  assert protocol["preprocess"] == {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "resize": "squash",
    "size": 24,
    "crop": "none",
    "interpolation": "bicubic, antialiased (Pillow)",
  }


def test_native_images_are_squashed():
  spec = models.ModelSpec.from_config(
    dict(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=16)
    | dict(position_resize="bilinear_antialiased")
  )
  params = random_params(spec)
  native = Preprocess(16, "native", patch_size=8, max_patches=5)
  got, want = (
    PatchPca(count=5).run(Encoder(spec, params, preprocess))
    for preprocess in (native, Preprocess(size=16))
  )
  assert got.metrics == want.metrics
  assert got.protocol == want.protocol
