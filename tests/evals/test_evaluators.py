"""Promises that every evaluation gives: options, data, meshes."""

import jax
import pytest

import mtv_jax
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.classification.knn import KNN
from mtv_jax.evals.classification.zero_shot import ZeroShot
from mtv_jax.evals.core import base
from mtv_jax.evals.core.base import NotApplicable, build_evaluator
from mtv_jax.evals.depth.depth_probe import DepthProbe
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.utils.errors import ConfigError


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("zeroshot", {}, "Did you mean 'zero_shot'"),
    ("zero_shot", {"batchsize": 5}, "Did you mean 'batch_size'"),
    ("zero_shot", {"classes": "presents"}, "Did you mean 'present'"),
    ("grounding", {"regions": "boxes"}, "regions is 'boxes'"),
    ("knn", {"feature": "poled"}, "Did you mean 'pooled'"),
    ("knn", {"k": (0, 10)}, "each an integer >= 1"),
    ("linear_probe", {"augment": "crop"}, "Did you mean 'crops'"),
    ("linear_probe", {"select": "test"}, "select is 'test'"),
    ("linear_probe", {"average": ("of",)}, "a list, each 'off' or 'on'"),
    ("linear_probe", {"blocks": (0,)}, "a list, each an integer >= 1"),
    ("linear_probe", {"rates": ()}, "linear_probe: rates is empty"),
    ("logistic", {"strengths": (0.0,)}, "each a number > 0"),
    ("logistic", {"normalize": "l1"}, "There are: l2, raw"),
    ("mae_probe", {"warmup": 90}, "mae_probe: warmup=90"),
    ("mae_probe", {"train_batch": 1}, "expected an integer >= 2"),
    ("segmentation", {"layers": "FOUR_LATS"}, "Did you mean 'FOUR_LAST'"),
    ("segmentation", {"flips": "horizontal"}, "flips is 'horizontal'"),
    ("segmentation", {"dropout": 1.0}, "expected a number below 1"),
    ("zero_shot_segmentation", {"average": "max"}, "average is 'max'"),
    ("depth_probe", {"protocol": "lin5"}, "Did you mean 'lin4'"),
    ("depth_probe", {"augment": "tolbox"}, "Did you mean 'toolbox'"),
    ("depth_probe", {"crop": "nyu_eigne"}, "Did you mean 'nyu_eigen'"),
    ("relative_depth", {"protocol": "mida"}, "Did you mean 'midas'"),
    ("geometric_correspondence", {"metres": (0.2, 0.1)}, "increasing"),
    ("geometric_correspondence", {"count": 0}, "expected an integer >= 1"),
    ("geometric_correspondence", {"norm": "finale"}, "Did you mean 'final'"),
    ("geometric_correspondence", {"subset": "wildset"}, "mean 'wild_set'"),
    ("semantic_correspondence", {"aggregate": "images"}, "mean 'image'"),
  ],
)
def test_bad_options(name, options, message):
  with pytest.raises(ConfigError, match=message):
    build_evaluator(name, options)


def test_options_without_a_config():
  with pytest.raises(ConfigError, match=r"KNN.k is \(0,\), expected a list"):
    KNN(k=(0,))
  config = {"type": "zero_shot", "count": 5, "every_steps": 100}
  assert build_evaluator("mine", config) == ZeroShot(count=5)
  built = build_evaluator("depth_probe", {"layers": [3], "every_steps": 1})
  assert built == DepthProbe(layers=(3,))


@pytest.mark.parametrize("name", base.EVALUATORS)
def test_missing_data_are_an_error_and_others_not_applicable(name, tmp_path):
  options = {}
  if "reference" in base.default_options(name):
    options["reference"] = str(tmp_path / "absent")
  with pytest.raises(FileNotFoundError, match="does not exist"):
    build_evaluator(name, {"data": str(tmp_path / "none"), **options}).prepare()
  if options:
    return
  with pytest.raises(NotApplicable):
    build_evaluator(name, {"data": str(tmp_path)}).prepare()


@pytest.mark.parametrize(
  "name",
  [n for n in base.EVALUATORS if "text" in build_evaluator(n, {}).requires],
)
def test_encoders_without_a_text_tower(name):
  evaluator = build_evaluator(name, {"count": 2})
  with pytest.raises(NotApplicable, match="no text tower"):
    evaluator.run(mtv_jax.load("pixels:16"))


@pytest.mark.parametrize(
  ("name", "view", "resized", "crop"),
  [
    ("zero_shot", "squash_center", 27, "center"),
    ("retrieval", "squash", 24, "none"),
  ],
)
def test_big_vision_views(colours, monkeypatch, name, view, resized, crop):
  colours.preprocess = Preprocess(size=24)
  seen, image = [], type(colours).image

  def record(self, images, **options):
    seen.append(self.preprocess)
    return image(self, images, **options)

  monkeypatch.setattr(type(colours), "image", record)
  result = build_evaluator(name, {"count": 4, "view": view}).run(colours)
  assert result.protocol["view"] == view
  (preprocess,) = seen
  assert (preprocess.resize_size, preprocess.crop) == (resized, crop)
  assert not preprocess.antialias and preprocess.resize == "squash"


@pytest.mark.slow
def test_meshes_and_batches_change_nothing():
  """Of correspondence; other evaluations, by the tests of what they call.

  Those are `Encoder.image` and `dense`, `probe.fit`, `probe_heads.predict_fn`
  and `knn.find_neighbours`.
  """
  one = make_mesh({"data": -1}, jax.devices()[:1])
  options, name = {"count": 4}, "geometric_correspondence"
  results = [
    build_evaluator(name, options | {"batch_size": size}).run(
      mtv_jax.load("random:mu/8@64", mesh=mesh)
    )
    for mesh, size in ((None, 16), (one, 7))
  ]
  for metric, value in results[0].metrics.items():
    assert results[1].metrics[metric] == pytest.approx(value, abs=2e-3), metric
  assert results[0].protocol["data_hash"] == results[1].protocol["data_hash"]
