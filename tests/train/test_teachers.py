"""`config.teachers`: read from a folder, copied from the EMA teacher."""

import jax
import numpy as np
import pytest

from mtv_jax.checkpoint.checkpointer import load_tree
from mtv_jax.config import schema
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.train.experiment import build_experiment
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.loop import train
from mtv_jax.train.step_spec import FrozenTeacher
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names


def recipe(**teacher):
  config = schema.read_config("dino_b16_224:tiny,batch=8")
  config.total_steps = 5
  head = dict(prototypes=8, hidden=8, bottleneck=8)
  config.objectives.distillation.update(head, view_local=None, koleo_weight=0.0)
  config.objectives.masked_latent = None
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

  # The next stage reads what the run's config names, of another size.
  config = recipe(path=str(first), step=4)
  assert config.weights == "teacher"
  config.model.update(width=32)
  experiment = build_experiment(config, tmp_path / "second")
  assert experiment.step_spec.teachers["gram"].model.image.width == 16
  # The resolved config builds the same without reading the folder's spec.
  assert build_experiment(experiment.config, "unused").config.teachers == (
    experiment.config.teachers
  )
  state = initialize_state(experiment)
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
    build_experiment(config, tmp_path / "third")


def test_when_a_teacher_is_copied():
  model = ModelSpec.from_config(dict(variant="mu/8", image_size=16))

  def due(**options):
    teacher = FrozenTeacher(model, **options)
    return [since for since in range(-2, 10) if teacher.due(since)]

  assert due() == []
  assert due(snapshot=True) == [0]
  assert due(snapshot=True, update_every=3) == [0, 3, 6, 9]
  assert due(update_every=3, max_updates=2) == [3, 6]


@pytest.mark.parametrize(
  ("teacher", "message"),
  [
    (
      dict(update_evry_steps=3),
      "teachers.gram.update_evry_steps is an unknown",
    ),
    (dict(weights="best"), "teachers.gram.weights"),
    (dict(path="/nowhere"), "/nowhere does not exist"),
  ],
  ids=["key", "weights", "path"],
)
def test_wrong_teachers_are_rejected(teacher, message, tmp_path):
  with pytest.raises((ConfigError, FileNotFoundError), match=message):
    build_experiment(recipe(**teacher), tmp_path)


def test_a_snapshot_needs_an_ema_teacher(tmp_path):
  config = recipe()
  config.objectives = dict(gram=dict(weight=1.0))
  config.model.mask_token = True
  with pytest.raises(ConfigError, match="EMA teacher, which no objective"):
    build_experiment(config, tmp_path)
  config = recipe().to_dict()
  config["objectives"]["gram"]["weight"] = 1.0
  config["objectives"]["distillation"]["weight"] = dict(start_steps=2)
  with pytest.raises(ConfigError, match="at step 0, which starts at step 2"):
    build_experiment(config, tmp_path)
