"""Drift: encoders that differ by a known change; measures of similarity."""

import re

import jax
import numpy as np
import pytest

from mtv_jax.convert import native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder import loading
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals import drift
from mtv_jax.evals.core.base import NotApplicable, build_evaluator
from mtv_jax.models import two_tower
from mtv_jax.utils.errors import InputError

_SHAPE = dict(width=32, depth=2, heads=2, mlp_dim=32)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """The folder of a model with random weights."""
  folder = tmp_path_factory.mktemp("start")
  return write_start(folder, Preprocess(size=16))


def write_start(folder, preprocess):
  fields = dict(patch_size=8, image_size=16, pool="mean", **_SHAPE)
  fields["position_resize"] = "bilinear_antialiased"
  spec = two_tower.ModelSpec.from_config(fields)
  params = jax.device_get(two_tower.init_params(spec, jax.random.key(0)))
  model = ConvertedModel(spec, params, preprocess.to_dict())
  return native.write(folder, model)


def gauge(folder, **options):
  data = dict(type="scenes", size=16, length=24)
  options = dict(reference=str(folder), data=data, k=4) | options
  return build_evaluator("drift", options)


def changed(encoder, change):
  """A copy whose second block has different parameters."""
  params = jax.tree.map(np.array, encoder.params)
  rng = np.random.default_rng(0)
  kernel = params["image"]["blocks"]["mlp"]["fc2"]["kernel"]
  kernel[1] += change * rng.normal(size=kernel[1].shape)
  return rebuild(encoder, encoder.spec, params)


def rebuild(encoder, spec, params):
  return type(encoder)(spec, params, encoder.preprocess, None, encoder.mesh)


def test_equal_encoders_read_one(start):
  encoder = loading.load(start)
  evaluator = gauge(start)
  result = evaluator.run(encoder)
  names = {"neighbours", "cka", "cosine", "cosine_patches"}
  assert {*result.metrics} == names | {"cosine_layer_0", "cosine_layer_1"}
  for name, value in result.metrics.items():
    assert value == pytest.approx(1, abs=1e-12), name
    assert re.fullmatch(evaluator.metric_pattern, name)
  assert result.metrics["neighbours"] == 1
  assert result.chance["neighbours"] == 4 / 23
  assert 0 < result.chance["cka"] < 0.9
  assert result.protocol["images"] == 24

  # A change of the second block does not affect the first; a larger change in
  # that direction lowers the rest more. The reference is read once.
  values = [result.metrics]
  for change in (0.05, 0.5):
    values.append(evaluator.run(changed(encoder, change)).metrics)
    assert values[-1]["cosine_layer_0"] == pytest.approx(1, abs=1e-12)
  for name in names:
    assert values[0][name] > values[1][name] > values[2][name], name


def test_padding_of_native_images_is_left_out(start, tmp_path):
  """Squares of 2 x 2 patches, padded to 5, drift as without padding."""
  preprocess = Preprocess(16, "native", patch_size=8, max_patches=5)
  folder = write_start(tmp_path / "native", preprocess)
  encoder = changed(loading.load(folder), 0.5)
  got = gauge(folder).run(encoder).metrics
  want = gauge(start).run(changed(loading.load(start), 0.5)).metrics
  assert got.keys() == want.keys() and want["cosine_patches"] < 0.99
  for name, value in want.items():
    assert got[name] == pytest.approx(value, abs=1e-5), name
  # Patches of different grids are not compared.
  other = gauge(start).run(encoder).metrics
  assert got.keys() - other.keys() == {"cosine_patches"}


def test_encoders_of_other_widths_have_neighbours_only(start):
  fields = dict(patch_size=8, image_size=16, pool="mean", **_SHAPE)
  spec = two_tower.ModelSpec.from_config(fields | dict(width=48))
  encoder = loading.load(start)
  params = two_tower.init_params(spec, jax.random.key(1))
  metrics = gauge(start).run(rebuild(encoder, spec, params)).metrics
  assert set(metrics) == {"neighbours", "cka"}


def test_what_is_not_applicable(start, tmp_path):
  with pytest.raises(NotApplicable, match="pass its folder as reference"):
    build_evaluator("drift", {}).prepare()
  with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
    gauge(tmp_path / "nowhere").prepare()
  with pytest.raises(InputError, match="has 24 images; k=24"):
    gauge(start, k=24).prepare()


@pytest.fixture
def pair():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(40, 6)).astype(np.float32)
  mixed = x @ rng.normal(size=(6, 9)) + 0.5 * rng.normal(size=(40, 9))
  return x, mixed.astype(np.float32)


def test_neighbour_agreement(pair):
  def nearest(x, i, k):
    cos = [
      -np.dot(x[i], x[j]) / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
      for j in range(len(x))
    ]
    others = [j for j in range(len(x)) if j != i]
    return {*sorted(others, key=lambda j: cos[j])[:k]}

  x, y = (a.astype(np.float64) for a in pair)
  want = [len(nearest(x, i, 5) & nearest(y, i, 5)) / 5 for i in range(40)]
  got = drift.neighbour_agreement(*pair, 5)
  np.testing.assert_allclose(got, want)
  assert 0.1 < got.mean() < 0.9
  equal = drift.neighbour_agreement(pair[0], 3 * pair[0], 5)
  np.testing.assert_array_equal(equal, 1)
  # Unrelated features agree by chance: k / (n - 1).
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(2, 600, 8))
  chance = drift.neighbour_agreement(x, y, 12).mean()
  assert chance == pytest.approx(12 / 599, abs=0.004)


def test_linear_cka(pair):
  """By the HSIC of the Gram matrices (Kornblith et al. 2019, equation 3)."""

  def hsic(k, l):
    h = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ h @ l @ h)

  x, y = (a.astype(np.float64) for a in pair)
  k, l = x @ x.T, y @ y.T
  want = hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))
  assert drift.linear_cka(*pair) == pytest.approx(want, rel=1e-9)
  rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
  assert drift.linear_cka(x, 2 * x @ rotation + 3) == pytest.approx(1)
  assert drift.linear_cka(x, np.ones((40, 2))) == 0


def test_cosines(pair):
  x = pair[0]
  np.testing.assert_allclose(drift.cosines(x, -2 * x), -1)
  np.testing.assert_array_equal(drift.cosines(x, 0 * x), 0)
  y = x[::-1]
  want = [
    np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    for a, b in zip(x, y, strict=True)
  ]
  np.testing.assert_allclose(drift.cosines(x, y), want, rtol=1e-5)
