"""Features of an encoder as labels: cached training equals in-step training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelling_samples import make_tars, open_base

from mtv_jax.augment import views
from mtv_jax.convert import native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.data import pipeline
from mtv_jax.data.labels.join import join_labels
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.experts.build import build_expert
from mtv_jax.experts.labelling import run as labelling
from mtv_jax.models.two_tower import ModelSpec, init_params
from mtv_jax.objectives import build_objective
from mtv_jax.train import forward, initialization
from mtv_jax.train import spec as spec_lib
from mtv_jax.train.teachers import FrozenTeacher, PixelMap
from mtv_jax.utils.errors import ConfigError, InputError

NAME = "feature_distillation"
TOWER = dict(width=16, depth=2, heads=2, mlp_dim=16)
STUDENT = ModelSpec.from_config(dict(TOWER, variant="mu/8", image_size=16))
TEACHER = ModelSpec.from_config(
  dict(TOWER, variant="mu/4", image_size=12, pool="cls", registers=1)
)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
PIXELS = PixelMap.between(((0.5,) * 3, (0.5,) * 3), (MEAN, STD))
SIZE, CANVAS = 16, 20  # Sizes of the teacher's view and the stored image.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp("features")
  params = jax.device_get(init_params(TEACHER, jax.random.key(3)))
  preprocess = Preprocess(size=8, mean=MEAN, std=STD).to_dict()
  native.write(folder / "teacher", ConvertedModel(TEACHER, params, preprocess))
  make_tars(folder / "shards", shards=1)
  return folder


def label(folders, format):
  options = dict(size=SIZE, canvas=CANVAS, layers=(-1,), batch_size=2)
  options["format"] = format
  expert = build_expert("features", folders / "teacher", options=options)
  base, out = open_base(folders / "shards"), folders / format
  labelling.run(expert, base, out, threads=1)
  return expert, base, out


def make_spec(cached, ops="resize(16)", **options):
  teacher = FrozenTeacher(
    TEACHER, size=SIZE, layers=(1,), pixels=PIXELS, cached=cached
  )
  built = views.build_views({"image": dict(count=2, ops=ops)})
  objective = build_objective(NAME, options)
  return spec_lib.StepSpec(
    model=STUDENT,
    dtype="float32",
    objectives={NAME: objective.resolve(STUDENT, built, {"t": teacher})},
    weights={NAME: spec_lib.ObjectiveWeight(1.0)},
    views=built,
    seed=0,
    total_steps=10,
    teachers={} if cached else {"t": teacher},
  )


def batch_of(base, out, spec):
  source = join_labels(base, dict(features=dict(t=str(out))))
  ops = f"decode|canvas({CANVAS})|features"
  with pipeline.make_loader(
    dict(ops=ops, max_corrupt=1.0),
    batch_size=8,
    seed=0,
    sources=[source],
    features=spec.feature_layouts,
  ) as loader:
    return jax.tree.map(jnp.asarray, next(loader))


def read_targets(spec, batch, teachers):
  """The teacher's features as the objective compares them, and valid rows."""
  params = spec_lib.init_params(spec, jax.random.key(0))
  state = spec_lib.TrainState(
    step=jnp.int32(0), params=params, opt_state=(), teacher={}, ema={},
    statistics={NAME: spec.objectives[NAME].initial_statistics()},
    teachers=teachers,
  )  # fmt: skip
  keys = forward.view_keys(spec, state.step, 8, None)

  @jax.jit
  def run(batch):
    features = initialization.compute_statistics_features(
      spec, state, batch, keys
    )
    inputs = forward.compute_loss_inputs(spec, params, state, batch, keys)
    _, terms = forward.compute_losses(spec, params["heads"], state, inputs)
    return features[NAME]["t_layer1"], terms[NAME].loss.value()

  (features, valid), loss = run(batch)
  return np.asarray(features), np.asarray(valid)[:, 0, 0] > 0, float(loss)


def relative_error(x, y):
  return np.abs(x - y).max() / np.abs(y).max()


@pytest.mark.slow
def test_cached_equals_in_step(folders):
  params = init_params(TEACHER, jax.random.key(3))
  in_step, want = make_spec(None), None
  for format, bound in (("float8", 1 / 16), ("int8", 1 / 254)):
    _, base, out = label(folders, format)
    spec = make_spec(format)
    assert spec.plan.keys() == {spec.objectives[NAME].image}
    batch = batch_of(base, out, spec)
    got, valid, loss = read_targets(spec, batch, {})
    # Broken images are skipped; valid ones have labels.
    assert valid.all()
    if want is None:  # The images are equal.
      teachers = {"t": {"image": params["image"]}}
      want, _, want_loss = read_targets(in_step, batch, teachers)
    assert got.shape == want.shape == (8, 2, 4, 16)
    # Resampling to the student's grid adds up the roundings of neighbours.
    assert 0 < relative_error(got, want) < 2 * bound
    assert loss == pytest.approx(want_loss, rel=0.02)
  # Labels of another format than the config's.
  with pytest.raises(InputError, match="are int8 of .* expected float8 of"):
    batch_of(base, out, make_spec("float8"))


@pytest.mark.slow
def test_cached_patches_follow_crop_and_flip(folders):
  """A mirrored crop has the features of its part of the image."""
  _, base, out = label(folders, "int8")
  options = dict(summary_weight=0.0)
  whole = make_spec("int8", "resize(32)", **options)
  # Half of the canvas in each axis, on the stored grid of 4 x 4.
  half = make_spec("int8", "crop(16, 0.25, 0.25, (1, 1))|flip(1)", **options)
  batch = batch_of(base, out, whole)
  batch["image_size"] = jnp.full((8, 2), 20, jnp.int32)
  grid, _, _ = read_targets(whole, batch, {})
  cropped, _, _ = read_targets(half, batch, {})
  assert cropped.shape == (8, 2, 4, 16)
  keys = forward.view_keys(half, jnp.int32(0), 8, None)["image"]
  view = half.views["image"](
    batch["image"], batch["image_size"], keys, "float32"
  )
  planes = grid[:, 0].reshape(8, 4, 4, 16)
  for row, crop in np.ndindex(8, 2):
    y0, x0, y1, x1 = np.asarray(view.box[row, crop]) * 4 - 0.5
    ys = [y0 + (i + 0.5) * (y1 - y0) / 2 for i in range(2)]
    xs = [x1 - (i + 0.5) * (x1 - x0) / 2 for i in range(2)]
    for k, (y, x) in enumerate((y, x) for y in ys for x in xs):
      wy = np.maximum(1 - np.abs(np.arange(4) - y), 0)
      wx = np.maximum(1 - np.abs(np.arange(4) - x), 0)
      want = np.einsum("y,x,yxd->d", wy / wy.sum(), wx / wx.sum(), planes[row])
      np.testing.assert_allclose(cropped[row, crop, k], want, atol=1e-4)


def test_pooled_features_need_whole_images():
  with pytest.raises(ConfigError, match="summary_weight=0"):
    make_spec("int8", "crop(16, 0.25, 1.0)")


def test_the_default_size_is_the_encoders(folders):
  settings = build_expert("features", folders / "teacher").settings
  assert settings["size"] == settings["canvas"] == 8


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ({"side": 32}, "no option 'side'"),
    ({"size": 18}, "not divisible"),
    ({"layers": (2,)}, "layer 2 of an encoder with 2 blocks"),
  ],
)
def test_wrong_options_are_rejected(folders, option, message):
  with pytest.raises(InputError, match=message):
    build_expert("features", folders / "teacher", options=option)
