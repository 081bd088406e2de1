"""`config.teachers`: read from a folder, copied from the EMA teacher."""

import json
import os

import jax
import numpy as np
import pytest
import trainings

from mtv_jax.checkpoint.reading import load_tree
from mtv_jax.cli.train import train
from mtv_jax.config import recipes
from mtv_jax.convert import native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder import loading
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models.two_tower import ModelSpec, init_params
from mtv_jax.train import initialization
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.run import open_run
from mtv_jax.train.teachers import FrozenTeacher
from mtv_jax.train.workdir import read_recorded_config
from mtv_jax.utils.errors import ConfigError, UserError
from mtv_jax.utils.tree import flatten_with_names


def recipe(**teacher):
  config = recipes.read_config("dino_b16_224:tiny,batch=8")
  config.total_steps = 5
  head = dict(prototypes=8, hidden=8, bottleneck=8)
  config.objectives.dino.update(head, view_local=None, koleo_weight=0.0)
  config.objectives.ibot = None
  config.objectives["gram"] = dict(weight=dict(value=2.0, start_steps=1))
  crop = "crop(16, 0.4, 1.0)"
  config.views = {"global": dict(count=2, ops=crop)}
  config.model.update(image_size=16, width=16, heads=2, mlp_dim=16)
  config.optim.rules = ()
  config.teachers = dict(gram=teacher)
  config.checkpoint = dict(every_steps=1, keep=9)
  return config


def leaves(folder, part, step):
  return dict(flatten_with_names(load_tree(folder, part=part, step=step)))


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.slow
def test_teachers_of_a_run(tmp_path):
  """A snapshot after one step and after two more, then of that run's folder."""
  first = tmp_path / "first"
  train(recipe(update_every_steps=2, max_updates=1), first)
  ema, gram = (
    {s: leaves(first, part, s) for s in range(1, 6)}
    for part in ("teacher/image", "teachers/gram/image")
  )
  assert_equal(gram[2], ema[1])
  assert_equal(gram[3], ema[1])
  assert_equal(gram[4], ema[3])
  assert_equal(gram[5], ema[3])
  name = "patch_embed/kernel"
  assert np.abs(ema[3][name] - ema[1][name]).max() > 0

  # The next stage, of another size, reads the weights in the run's config.
  config = recipe(path=str(first), step=4)
  assert config.weights == "teacher"
  config.model.update(width=32)
  run = open_run(config, tmp_path / "second")
  assert run.spec.teachers["gram"].model.image.width == 16
  # The resolved config builds without reading the folder's spec.
  again = open_run(run.config.to_dict(), "unused")
  assert again.config.teachers == run.config.teachers
  for changes, message in (
    (dict(step=9), "no checkpoint of step 9 in .* steps are: 1,"),
    (dict(weights="ema"), "4/state has no 'ema'. Its parts are: "),
  ):
    with pytest.raises(UserError, match=message):
      wrong = dict(path=str(first), step=4) | changes
      open_run(recipe(**wrong), tmp_path / "wrong")
  state = initialize_state(run)
  got = dict(flatten_with_names(state.teachers["gram"]["image"]))
  assert_equal(jax.device_get(got), ema[4])
  assert state.params["image"]["patch_embed"]["kernel"].shape[1] == 32

  # Once it has a checkpoint, the second run needs the first no more.
  config.total_steps = 2
  config.checkpoint = dict(every_steps=1)
  train(config, tmp_path / "second")
  first.rename(tmp_path / "moved")
  config.total_steps = 3
  train(config, tmp_path / "second")
  assert_equal(leaves(tmp_path / "second", "teachers/gram/image", 3), ema[4])
  with pytest.raises(FileNotFoundError, match="first does not exist"):
    open_run(config, tmp_path / "third")


def test_when_a_teacher_is_copied():
  model = ModelSpec.from_config(dict(variant="mu/8", image_size=16))

  def due(**options):
    teacher = FrozenTeacher(model, **options)
    return [since for since in range(-2, 10) if teacher.due(since)]

  assert due() == []
  assert due(snapshot=True) == [0]
  assert due(snapshot=True, update_every=3) == [0, 3, 6, 9]
  assert due(update_every=3, max_updates=2) == [3, 6]


LATE = dict(weight=dict(start_steps=2))


@pytest.mark.parametrize(
  ("teacher", "objectives", "message"),
  [
    (
      dict(update_evry_steps=3),
      {},
      "teachers.gram.update_evry_steps is an",
    ),
    (dict(weights="best"), {}, "teachers.gram.weights"),
    (dict(path="/nowhere"), {}, "/nowhere does not exist"),
    (dict(), dict(dino=None), "EMA teacher, which no objective"),
    (dict(), dict(dino=LATE), "at step 0, which starts at step 2"),
  ],
)
def test_wrong_teachers_are_rejected(teacher, objectives, message, tmp_path):
  config = recipe(**teacher).to_dict()
  config["model"]["mask_token"] = True
  config["objectives"]["gram"]["weight"] = 1.0
  for name, changes in objectives.items():
    entry = config["objectives"][name]
    config["objectives"][name] = changes and {**entry, **changes}
  with pytest.raises((ConfigError, FileNotFoundError), match=message):
    open_run(config, tmp_path)


# ---------------------------------------------------------------------------
# Distillation from two encoders.

TOWER = dict(image_size=16, width=16, depth=1, heads=2, mlp_dim=16)


def write_encoder(folder, seed, *, mean=0.5, size=None, **fields):
  """An encoder of random weights in a folder that `mtv_jax.load` reads."""
  spec = ModelSpec.from_config(dict(TOWER, **fields))
  size = size or spec.image.image_size
  preprocess = Preprocess(size=size, mean=(mean,) * 3).to_dict()
  params = jax.device_get(init_params(spec, jax.random.key(seed)))
  native.write(folder, ConvertedModel(spec, params, preprocess))
  return str(folder)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
  folder = tmp_path_factory.mktemp("encoders")
  return dict(
    near=write_encoder(folder / "near", 1, variant="mu/8"),
    # Other pixels, patches and size, with a CLS token.
    far=write_encoder(
      folder / "far", 2, mean=0.4, variant="mu/4", pool="cls", image_size=12
    ),
  )


def distillation(encoders, *, steps=4, **teacher):
  return dict(
    seed=0,
    batch_size=8,
    total_steps=steps,
    data=dict(
      train=[dict(type="scenes", size=24, length=40)], ops="decode|canvas(24)"
    ),
    views=dict(image=dict(ops="crop(16, 0.5, 1.0)|flip")),
    model=dict(variant="mu/8", dtype="float32", **TOWER),
    objectives=dict(feature_distillation=dict(statistics_examples=16)),
    teachers={n: dict(path=p, **teacher) for n, p in encoders.items()},
    optim=dict(lr=1e-2),
    schedule=dict(name="constant"),
    checkpoint=dict(every_steps=2),
    log=dict(every_steps=1, trackers="jsonl"),
  )


@pytest.fixture(scope="module")
def distilled(encoders, tmp_path_factory):
  """The folder of a run of two teachers, and its last state."""
  folder = tmp_path_factory.mktemp("distilled") / "run"
  return folder, train(distillation(encoders), folder)


@pytest.mark.slow
def test_two_teachers(encoders, distilled):
  """One entry per teacher; both are learned, with their pixels and patches."""
  folder, state = distilled
  rows = (folder / "metrics.jsonl").read_text().splitlines()
  for name in encoders:
    key = f"feature_distillation/{name}_patches_loss"
    losses = [json.loads(row)[key] for row in rows]
    assert losses[-1] < losses[0]
    fitted = state.statistics["feature_distillation"]
    assert np.abs(fitted[f"{name}_patches_mean"]).max() > 0
  recorded = read_recorded_config(folder)["teachers"]["far"]
  assert recorded["image_mean"] == [0.4] * 3


@pytest.mark.slow
def test_a_resumed_run_fits_no_statistics(
  encoders, distilled, tmp_path, monkeypatch
):
  """It equals the uninterrupted one, and reads no teacher's folder again."""
  config, part = distillation(encoders), tmp_path / "part"
  train({**config, "total_steps": 2}, part)
  monkeypatch.setattr(initialization, "make_loader", None)
  for path in encoders.values():
    os.rename(path, f"{path}.moved")
  try:
    train(config, part)
  finally:
    for path in encoders.values():
      os.rename(f"{path}.moved", path)
  for branch in ("params", "statistics", "teachers"):
    assert_equal(leaves(part, branch, 4), leaves(distilled[0], branch, 4))


@pytest.mark.slow
def test_two_processes_fit_the_statistics_of_one(encoders, tmp_path):
  """Each process reads its rows; the statistics are of all of them."""
  options = "dict(statistics_examples=32, normalize='standardize')"
  args = (
    f"--config.teachers.far=dict(path={encoders['far']!r})",
    f"--config.objectives.feature_distillation={options}",
    trainings.NO_EVALS,
  )
  one, two = tmp_path / "one", tmp_path / "two"
  trainings.train(one, *args, devices=2, arg="steps=2,save=2")
  trainings.pair(two, *args, devices=1, arg="steps=2,save=2")
  want, got = leaves(one, "statistics", 2), leaves(two, "statistics", 2)
  assert np.abs(want["feature_distillation/far_patches_mean"]).max() > 0
  for name, value in want.items():
    np.testing.assert_allclose(
      got[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )
  assert trainings.losses(two) == pytest.approx(trainings.losses(one), rel=1e-4)


def test_weights_of_teachers_are_read_once(encoders, tmp_path, monkeypatch):
  """Only when needed: building a run does not read them."""
  monkeypatch.setattr(loading, "read_model", None)
  open_run(distillation(encoders), tmp_path)
  for options, message in (
    (dict(weights="ema"), "is not a training run, so it has one"),
    (dict(step=3), "is not a training run, so it has one"),
    (dict(size=18), "config.teachers.far.size: An image of 18x18"),
    (dict(layers=[1]), "far.layers: 1 is outside an encoder with 1 blocks"),
  ):
    with pytest.raises(UserError, match=message):
      open_run(distillation(encoders, **options), tmp_path)


def test_a_teacher_sees_images_of_its_preprocessing(tmp_path):
  """And not of the size of its stored positions."""
  folder = tmp_path / "large"
  path = write_encoder(folder, 1, variant="mu/8", image_size=48, size=24)

  def grid(**teacher):
    config = distillation({"large": path}, **teacher)
    built = open_run(config, tmp_path / "run")
    objective = built.spec.objectives["feature_distillation"]
    return built.config, objective.targets[1].stored_grid

  config, stored = grid()
  assert stored == 3 and config.teachers["large"].input_size == 24
  assert config.teachers["large"].size is None  # `gram` takes the view's.
  assert grid(size=48)[1] == 6
  # A config from before this key.
  assert grid(model=config.teachers["large"].model)[1] == 6
  path = write_encoder(tmp_path / "odd", 1, variant="mu/8", size=20)
  with pytest.raises(ConfigError, match="config.teachers.large.size: .*20x20"):
    grid()
