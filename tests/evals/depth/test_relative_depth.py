"""Relative depth: alignments, published protocols, end-to-end runs."""

import json

import cv2
import jax
import numpy as np
import pytest
from random_trees import random_leaves

import mtv_jax
from mtv_jax.data.scenes import render as scenes
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.core import resizing
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.depth import metrics, relative_depth
from mtv_jax.evals.depth.relative_depth import RelativeDepth, align
from mtv_jax.models import two_tower as models
from mtv_jax.models.heads import dpt
from mtv_jax.models.heads.dpt import DepthHead
from mtv_jax.parallel.mesh import make_mesh

GT = np.array([1, 2, 4, 5, 9.0])
PREDICTED = np.array([2.1, 1.2, 0.7, 0.5, -0.3])


@pytest.mark.parametrize(
  ("alignment", "abs_rel"),
  [("disparity", 0.182261), ("depth", 0.368258), ("disparity_space", 0.455356)]
  # All pixels of a prediction with negative values are fitted.
  + [("disparity_positive", 0.182261)],
)
def test_alignments_golden(alignment, abs_rel):
  depth = align(PREDICTED, GT, alignment=alignment, cap=10)
  truth = 1 / GT if alignment == "disparity_space" else GT
  got = metrics.image_metrics(depth, truth, ("abs_rel", "delta1", "rmse"))
  assert got["abs_rel"] == pytest.approx(abs_rel, abs=1e-6)
  if alignment == "disparity":
    want = [1.116011, 1.816668, 2.789682, 3.550305, 10]
    np.testing.assert_allclose(depth, want, atol=1e-6)
    assert got["delta1"] == 0.6
    assert got["rmse"] == pytest.approx(0.960578, abs=1e-6)


def test_disparity_positive_fits_positive_predictions():
  """Like Marigold's maps in 0..1; 0 means no prediction."""
  predicted = np.maximum(PREDICTED, 0)
  got = align(predicted, GT, alignment="disparity_positive", cap=10)
  rows = np.stack([predicted[:4], np.ones(4)], axis=1)
  (s, t), *_ = np.linalg.lstsq(rows, 1 / GT[:4], rcond=None)
  want = 1 / np.maximum(s * predicted + t, 1e-3)
  assert want[-1] == 1000
  np.testing.assert_allclose(got, np.clip(want, 1e-3, 10), rtol=1e-9)


def test_disparity_positive_of_a_head_without_relu_fits_all_pixels():
  """A third of the pixels is positive; fit to that third, AbsRel > 1."""
  rng = np.random.default_rng(0)
  truth = rng.uniform(1, 10, 3000)
  inverse = 1 / truth + rng.normal(0, 0.05, len(truth))
  predicted = 3 * (inverse - np.quantile(inverse, 2 / 3))
  assert np.mean(predicted > 0) == pytest.approx(1 / 3, abs=1e-3)
  options = {"alignment": "disparity_positive", "cap": 10}
  scores = [
    metrics.image_metrics(align(x, truth, **options), truth, ("abs_rel",))
    for x in (predicted, 5 * predicted + 100)
  ]
  all_pixels = align(predicted, truth, cap=10)
  want = metrics.image_metrics(all_pixels, truth, ("abs_rel",))
  assert scores[0] == pytest.approx(want, abs=0.01)
  # The zero of an affine-invariant prediction is arbitrary.
  assert scores[1] == pytest.approx(scores[0], abs=1e-9)


def test_constant_predictions_align_to_the_cap():
  flat = np.full(5, 0.4)
  assert align(flat, GT, cap=10).tolist() == [10] * 5
  best = align(None, GT, cap=10)
  np.testing.assert_allclose(best, 1 / np.mean(1 / GT))


class OracleEncoder(Encoder):
  """Predicts an affine function of the true inverse depth of scenes."""

  def can_predict(self, name):
    return name == "depth"

  def __init__(self, *, noise=0.0, size=32):
    self.noise, self.size = noise, size
    self.preprocess = Preprocess(size=size)
    self.shapes = []

  def __repr__(self):
    return "OracleEncoder()"

  def protocol(self):
    return {"encoder": "oracle"}

  def depth(self, images, *, batch_size=16):
    self.shapes += [image.shape for image in images]
    first = 1_000_000 + len(self.shapes) - len(images)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(len(images)):
      inverse = 1 / scenes.render(first + i, size=self.size).depth
      rows.append(-3 * inverse + 50 + rng.normal(0, self.noise, inverse.shape))
    return np.stack(rows).astype(np.float32)


def test_affine_predictions_are_perfect():
  """With a negative scale, over several blocks of images."""
  evaluator = RelativeDepth(count=6, batch_size=1, pictures=2)
  result = evaluator.run(OracleEncoder())
  names = ["abs_rel", "delta1", "delta2", "delta3", "rmse"]
  assert list(result.metrics) == list(result.errors) == names
  assert result.metrics["abs_rel"] < 1e-4
  assert result.metrics["rmse"] < 1e-3
  assert result.metrics["delta1"] == 1
  assert result.chance["abs_rel"] > 0.3
  assert result.units == {"rmse": "m", "abs_rel": ""}
  assert set(result.lower) == {"rmse", "abs_rel"}
  protocol = json.loads(json.dumps(result.protocol))
  assert protocol["encoder"] == "oracle"
  assert (protocol["images"], protocol["images_skipped"]) == (6, 0)
  assert (protocol["protocol"], protocol["cap"]) == ("midas", 20)
  assert result.sheets["depth"].shape == (28 + 2 * 178 + 8, 3 * 178 + 16, 3)
  noisy = evaluator.run(OracleEncoder(noise=0.2))
  assert 0.02 < noisy.metrics["abs_rel"] < result.chance["abs_rel"]
  space = RelativeDepth(count=2, alignment="disparity_space")
  space = space.run(OracleEncoder())
  assert "rmse" not in space.metrics
  assert space.metrics["delta1"] == 1


PUBLISHED = {
  ("kitti", "midas"): {
    "cut": "none", "crop": "none", "resize": "bilinear", "low": 0,
    "high": None, "cap": 80,
  },
  ("nyu", "midas"): {"high": 10},
  ("kitti", "depth_anything"): {
    "cut": "kb", "crop": "garg", "high": 80, "resize": "bilinear_corners",
  },
  ("kitti", "marigold"): {
    "crop": "kitti_eigen", "min_depth": 1e-5,
    "alignment": "disparity_positive",
  },
  ("nyu", "marigold"): {"crop": "nyu_eigen"},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "protocol"), PUBLISHED)
def test_published_protocols(kind, protocol):
  got = vars(RelativeDepth(protocol=protocol)._resolve_protocol(kind))
  assert PUBLISHED[kind, protocol].items() <= got.items()
  options = {"cap": 8.0, "crop": "none", "alignment": "depth"}
  custom = vars(RelativeDepth(**options)._resolve_protocol("nyu"))
  assert (options | {"high": 8}).items() <= custom.items()


def test_cut_of_kitti():
  x = np.arange(375 * 1242).reshape(375, 1242)
  got = relative_depth.cut(x, "kb")
  assert got.shape == (352, 1216)
  assert got[0, 0] == x[375 - 352, 13]
  assert relative_depth.cut(x, "none") is x
  with pytest.raises(ValueError, match="this one is 100 x 1242"):
    relative_depth.cut(x[:100], "kb")


def test_images_with_few_valid_pixels_are_skipped():
  evaluator = RelativeDepth(count=4, cap=2.5, min_pixels=370)
  result = evaluator.run(OracleEncoder())
  depths = [scenes.render(1_000_000 + i, size=32).depth for i in range(4)]
  scored = sum((d < 2.5).sum() >= 370 for d in depths)
  assert 0 < scored < 4
  assert result.protocol["images"] == scored
  assert result.protocol["images_skipped"] == 4 - scored
  with pytest.raises(ValueError, match="none of 4 images"):
    RelativeDepth(count=4, min_pixels=2000).run(OracleEncoder())


def test_unsupported_encoders():
  encoder = OracleEncoder()
  encoder.preprocess = Preprocess(size=32, resize="shortest", crop="center")
  with pytest.raises(NotApplicable, match="central crop only"):
    RelativeDepth(count=1).run(encoder)
  encoder.can_predict = lambda name: False
  with pytest.raises(NotApplicable, match="has no depth head"):
    RelativeDepth(count=1).run(encoder)


def encoder_with_head(devices=None):
  """A tiny tower with a DPT head of random weights."""
  config = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2}
  spec = models.ModelSpec.from_config({**config, "heads": 2, "mlp_dim": 32})
  head = DepthHead((0, 0, 1, 1), 8, (8, 8, 8, 8), size=8)
  module = dpt.DPT(
    features=8, channels=head.channels, tap_norm="layer", upsample=1
  )
  stages = [jax.ShapeDtypeStruct((1, 2, 2, 16), np.float32)] * 4
  shapes = jax.eval_shape(
    lambda *x: module.init(jax.random.key(0), x, (8, 8)), *stages
  )
  params = models.abstract_params(spec) | {"heads": {"depth": shapes["params"]}}
  return Encoder(
    spec,
    random_leaves(params, std=0.3),
    Preprocess(size=16),
    mesh=make_mesh({"data": -1}, devices),
    prediction_heads={"depth": head},
  )


@pytest.mark.slow
@pytest.mark.parametrize("data", ["scenes", "nyuv2", "kitti_object"])
def test_one_device_and_eight_agree(shared_data, data):
  if data != "scenes":
    data = str(shared_data / data)
  result = RelativeDepth(data=data, count=9, batch_size=8).run(
    encoder_with_head()
  )
  single = RelativeDepth(data=data, count=9, batch_size=3).run(
    encoder_with_head(jax.devices()[:1])
  )
  assert single.metrics == pytest.approx(result.metrics, rel=1e-4)
  # After alignment hardly worse than the best constant in inverse depth.
  assert result.metrics["abs_rel"] < 1.5 * result.chance["abs_rel"]


@pytest.mark.parametrize(
  ("protocol", "cut"),
  [("midas", "none"), ("depth_anything", "kb"), ("marigold", "kb")],
)
def test_real_kitti(shared_data, protocol, cut):
  """Predicts the sparse truth, dilated to a dense map."""

  class Dilated(OracleEncoder):
    def depth(self, images, *, batch_size=16):
      rows = []
      for i in range(len(images)):
        depth = relative_depth.cut(evaluator._set(96).maps[i], cut)
        assert depth.shape == images[i].shape[:2]
        inverse = np.where(depth > 0, 1 / np.maximum(depth, 1), 0)
        filled = cv2.dilate(inverse, np.ones((9, 15), np.uint8))
        rows.append(resizing.resize_maps(filled, (128, 256)))
      return np.stack(rows).astype(np.float32)

  data = str(shared_data / "kitti_object")
  evaluator = RelativeDepth(data=data, protocol=protocol)
  result = evaluator.run(Dilated())
  assert result.protocol["images"] == 2
  assert result.protocol["image_cut"] == cut
  assert result.metrics["abs_rel"] < 0.4 * result.chance["abs_rel"]


class Shapes(OracleEncoder):
  """Predicts rows of its input, and records the inputs' shapes."""

  prediction_heads = {"depth": DepthHead(scale=8)}

  def __init__(self):
    super().__init__(size=32)
    self.spec = models.ModelSpec.from_config({"variant": "mu/8"})

  def with_preprocess(self, preprocess):
    self.preprocess = preprocess
    return self

  def depth(self, images, *, batch_size=16, resize=True):
    if not resize:
      assert len({image.shape for image in images}) == 1
      self.shapes += [image.shape for image in images]
      return np.stack([image[..., 0] for image in images])
    size = self.preprocess.size
    self.shapes += [(size, size, 3) for _ in images]
    return np.zeros((len(images), size, size), np.float32)


def test_inputs_have_the_images_aspect_ratio(shared_data):
  """Depth Anything's: the shorter side at least the size, by the patch."""
  encoder, data = Shapes(), str(shared_data / "kitti_object")
  result = RelativeDepth(data=data, protocol="depth_anything").run(encoder)
  # 352 x 1216 of KITTI: 32 x 110.5.
  assert set(encoder.shapes) == {(32, 112, 3)}
  assert result.protocol["aspect"] == "keep"
  assert result.protocol["input_size"] == 32
  encoder.shapes.clear()
  options = {"aspect": "squash", "input_size": 40}
  result = RelativeDepth(count=3, **options).run(encoder)
  assert encoder.shapes == [(40, 40, 3)] * 3
  assert result.protocol["aspect"] == "squash"
  encoder.prediction_heads = {}
  assert RelativeDepth(count=1).run(encoder).protocol["aspect"] == "squash"
  # Shapes of a block are mixed, and maps come back in the images' order.
  images = [
    np.full((height, width, 3), 10 * i, np.uint8)
    for i, (height, width) in enumerate([(30, 60), (60, 30), (30, 60)])
  ]
  inputs = (
    relative_depth.resize_keeping_aspect_ratio(image, size=16, multiple=8)
    for image in images
  )
  maps = list(
    relative_depth.predict_maps(encoder, inputs, resize=False, batch_size=2)
  )
  assert [m.shape for m in maps] == [(16, 32), (32, 16), (16, 32)]
  assert [m.mean() for m in maps] == pytest.approx([0, 10, 20], abs=1e-4)
  with pytest.raises(ValueError, match="nearest valid size is 40x40"):
    RelativeDepth(count=1, aspect="squash", input_size=41).run(encoder)


@pytest.mark.reference
def test_depth_anything_equals_the_original_steps(tmp_path, shared_data):
  """A ViT-S of random weights on NYUv2: resize, network, upsampling, fit.

  At 140 pixels instead of 518.
  """
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from tools.transformers_experts import write_depth_anything

  model = write_depth_anything("S", tmp_path)
  mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])

  def infer(image):
    height, width = image.shape[:2]
    scale = max(140 / height, 140 / width)
    rows, columns = (
      int(np.round(scale * side / 14) * 14) for side in (height, width)
    )
    pixels = cv2.resize(
      image / 255, (columns, rows), interpolation=cv2.INTER_CUBIC
    )
    pixels = np.float32((pixels - mean) / std).transpose(2, 0, 1)
    with torch.no_grad():
      depth = model(torch.from_numpy(pixels[None].copy())).predicted_depth
      depth = torch.nn.functional.interpolate(
        depth[None], (height, width), mode="bilinear", align_corners=True
      )
    return depth[0, 0].numpy().astype(np.float64)

  evaluator = RelativeDepth(
    data=str(shared_data / "nyuv2"),
    protocol="depth_anything",
    count=2,
    input_size=140,
  )
  data, want = evaluator._set(140), []
  for i in range(2):
    image, truth = data.images[i], data.maps[i].astype(np.float64)
    assert image.shape == (480, 640, 3)
    predicted = infer(image)
    valid = np.zeros(truth.shape, bool)
    valid[45:471, 41:601] = True
    valid &= (truth > 1e-3) & (truth < 10)
    rows = np.stack([predicted[valid], np.ones(valid.sum())], axis=1)
    fit, *_ = np.linalg.lstsq(rows, 1 / truth[valid], rcond=None)
    depth = 1 / np.maximum(rows @ fit, 1 / 10)
    want.append(np.mean(abs(depth - truth[valid]) / truth[valid]))
  encoder = mtv_jax.load(tmp_path)
  result = evaluator.run(encoder)
  assert result.protocol["aspect"] == "keep"
  assert result.metrics["abs_rel"] == pytest.approx(np.mean(want), rel=1e-4)
