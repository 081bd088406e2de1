"""The loop, on the smallest config, in this process with eight devices."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import numpy as np
import pytest
import trainings
from dataset_samples import image_bytes, write_tar
from trainings import smallest

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.checkpoint.reading import saved_steps
from mtv_jax.cli.train import dry_run, train
from mtv_jax.encoder import loading
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.retrieval import Retrieval
from mtv_jax.hooks.evaluation import EvaluationHook, open_evaluators
from mtv_jax.train.describe import find_labelled
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.run import (
  make_loader,
  open_run,
  save_config,
)
from mtv_jax.train.runtime.sessions import read_alive, read_sessions
from mtv_jax.train.spec import ObjectiveWeight
from mtv_jax.utils import atomic


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained") / "run"
  config = smallest()
  config.log.profile_steps = (3, 4)
  state = train(config, workdir, command="mtv-jax train")
  return workdir, state


def test_a_run_writes_config_metrics_evaluations_and_checkpoints(trained):
  workdir, state = trained
  assert int(state.step) == 12
  config = json.loads((workdir / "config.json").read_text())
  assert config["model"]["width"] == 32 and config["batch_size"] == 16
  losses = trainings.losses(workdir)
  assert list(losses) == list(range(1, 13))
  assert np.isfinite(list(losses.values())).all()
  assert losses[12] < losses[1]
  assert saved_steps(workdir) == [4, 8, 12]
  written = workdir / "evals" / "retrieval_12.json"
  evaluation = json.loads(written.read_text())
  figures = evaluation["evals"]["retrieval"]["metrics"]
  assert figures and all(0 <= v <= 1 for v in figures.values())
  assert trainings.rows(workdir)[-1].keys() >= {
    f"retrieval/{k}" for k in figures
  }
  assert list(workdir.glob("events.*"))


def test_a_run_records_its_session_goodput_and_profile(trained):
  workdir, _ = trained
  session = read_sessions(workdir)[0]
  assert (session["start_step"], session["last_step"]) == (0, 12)
  assert session["exit"] == "finished" and session["command"]
  assert session["device_kind"] == "cpu" and session["processes"] == 1
  alive = read_alive(workdir)
  assert (alive["step"], alive["activity"]) == (12, "exit")
  names = ("compile", "step", "wait", "save", "evaluate", "start", "lost")
  row = [r for r in trainings.rows(workdir) if r["step"] == 12][0]
  shares = {k: v for k, v in row.items() if k.startswith("goodput/")}
  assert sum(shares.values()) == pytest.approx(1.0)
  assert {f"goodput/{name}" for name in names} < shares.keys()
  assert shares["goodput/step"] > 0 and shares["goodput/lost"] == 0
  (trace,) = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
  assert trace.stat().st_size > 1000


def test_a_finished_run_started_again_changes_nothing(trained):
  workdir, state = trained
  before = trainings.rows(workdir)
  again = train(smallest(), workdir)
  assert int(again.step) == 12
  jax.tree.map(np.testing.assert_array_equal, again, state)
  assert trainings.rows(workdir) == before


def test_a_dry_run_says_what_would_happen_and_writes_nothing(trained, tmp_path):
  text = dry_run(smallest(), tmp_path / "new")
  assert not (tmp_path / "new").exists()
  for words in (
    "scenes, 50 records; 66.7 % of a batch",
    "scenes, 30 records; 33.3 % of a batch",
    "Read a batch of 16 rows in", "With labels: captions 100.0 %",
    "12 steps of 16 examples: 2.4 epochs of 80",
    "retrieval on scenes (24 images), every 12 steps",
    "at step 0, from random parameters",
  ):  # fmt: skip
    assert words in text, words
  workdir, _ = trained
  before = {f: f.stat().st_mtime_ns for f in workdir.rglob("*")}
  text = dry_run(smallest("steps=20"), workdir)
  assert text.endswith("Starts at step 12 of 20, from the last checkpoint.")
  assert {f: f.stat().st_mtime_ns for f in workdir.rglob("*")} == before
  # Nor an index beside tars.
  tar = tmp_path / "data" / "0.tar"
  write_tar(tar, {"a": {"jpg": image_bytes("red"), "txt": b"a"}})
  assert "0.tar, 1 records" in dry_run(
    smallest(f"batch=8,data={tar}"), tmp_path / "new"
  )
  assert [*tar.parent.iterdir()] == [tar]
  with pytest.raises(FileNotFoundError, match="/nowhere"):
    dry_run(smallest(init=dict(path="/nowhere")), tmp_path / "new")


def test_rows_with_any_label():
  valid = np.zeros((4, 3), bool)
  valid[1:, 0] = True
  depth = np.zeros((4, 2, 2), np.uint16)
  depth[0, 1, 1] = 7
  batch = {"depth": depth, "box_valid": valid, "boxes": np.ones((4, 3, 4))}
  labelled = find_labelled(batch)
  assert {k: v.mean() for k, v in labelled.items()} == dict(
    depth=0.25, boxes=0.75
  )


def test_a_checkpoint_of_another_shape_is_rejected_by_name(trained):
  workdir, _ = trained
  other = smallest()
  other.model.width = 64
  with pytest.raises(ValueError, match="mlp/fc1/kernel"):
    train(other, workdir)
  # The rejected config left no files.
  recorded = json.loads((workdir / "config.json").read_text())
  assert recorded["model"]["width"] == smallest().model.width


@pytest.mark.slow
def test_init_loads_the_parameters_of_another_run(trained, tmp_path):
  workdir, state = trained
  config = smallest(init=dict(path=str(workdir), include=("^image/", "^text/")))
  begun = initialize_state(open_run(config, tmp_path / "run"))
  for tower in ("image", "text"):
    pair = begun.params[tower], state.params[tower]
    jax.tree.map(np.testing.assert_array_equal, *pair)


def with_teacher(**changes):
  config = smallest(**changes)
  config.objectives.dino = trainings.DINO
  return config


@pytest.mark.slow
def test_init_continues_the_teacher_of_another_run(tmp_path):
  source = open_run(with_teacher(weights="teacher"), tmp_path / "a")
  state = initialize_state(source)
  rng = np.random.default_rng(0)
  teacher = jax.tree.map(
    lambda x: np.float32(x + rng.normal(size=x.shape)), state.teacher
  )
  save_config(source)
  with Checkpointer(tmp_path / "a" / "checkpoints", every_steps=1) as saver:
    saver.save(1, {"params": state.params, "teacher": teacher})
  init = dict(path=str(tmp_path / "a"))

  def begin(**options):
    config = with_teacher(seed=1, init={**init, **options})
    return initialize_state(open_run(config, tmp_path / "b"))

  def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)

  begun = begin(teacher=True)
  assert_equal(begun.params, state.params)
  assert_equal(begun.teacher, teacher)
  # DINOv3's high-resolution stage: the student is the teacher, with its head.
  begun = begin(teacher=True, weights="teacher")
  assert_equal(begun.teacher, teacher)
  assert_equal(begun.params["image"], teacher["image"])
  assert_equal(begun.params["heads"]["dino"], teacher["heads"]["dino"])
  begun = begin()
  assert_equal(begun.teacher["image"], state.params["image"])
  # New heads are copies of the student's.
  begun = begin(teacher=True, include=("^image/",))
  assert_equal(begun.teacher["image"], teacher["image"])
  assert_equal(begun.teacher["heads"]["dino"], begun.params["heads"]["dino"])
  with pytest.raises(ValueError, match="selects no parameter of a teacher"):
    begin(teacher=True, include=("^text/",))
  late = with_teacher(init={**init, "teacher": True})
  late.objectives.dino.weight = dict(value=1.0, start_steps=1)
  with pytest.raises(ValueError, match="init.teacher has no effect"):
    initialize_state(open_run(late, tmp_path / "b"))
  # By default, reads the weights that the run's config names.
  read = loading.read_model(tmp_path / "a")
  assert read.weights == "teacher"
  assert_equal(read.params["image"], teacher["image"])
  assert (
    loading.read_model(tmp_path / "a", weights="student").weights != "teacher"
  )


OPS = "decode|canvas(32)|caption({})"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(batch_size=12), "batch_size is 12"),
    (dict(mesh=dict(data=3)), "8 devices"),
    (dict(weights="teacher"), "config.weights: .*no 'teacher'"),
    ({"model.text.vocab_size": 100}, "vocab_size"),
    ({"data.ops": "decode|canvas(32)"}, "'caption'.*image"),
    ({"data.ops": OPS.format(8)}, "of 8 tokens.*length=16"),
    ({"data.ops": OPS.format(32)}, "of 32 tokens.*length=16"),
    ({"evals.retrieval.weights": "teacher"}, "no 'teacher' weights.*needs"),
    ({"evals.retrieval.weights": "emma"}, "Did you mean 'ema'"),
    ({"evals.retrieval.data": "nowhere"}, "nowhere"),
    ({"evals.retrieval.captions": 5}, "Did you mean 'max_captions'"),
    (
      {"objectives.contrastive.weight": dict(start_steps=3)},
      "the earliest objective starts at step 3",
    ),
    (
      {"objectives.contrastive.weight": dict(valu=1.0)},
      "Did you mean 'value'",
    ),
  ],
)
def test_invalid_configs_are_rejected(tmp_path, changes, message):
  config = smallest().to_dict()
  for key, value in changes.items():
    *parents, last = key.split(".")
    functools.reduce(dict.__getitem__, parents, config)[last] = value
  with pytest.raises((ValueError, OSError), match=message):
    run = open_run(config, tmp_path)
    EvaluationHook().open(run)
    make_loader(run, 0)


@pytest.mark.slow
def test_a_run_on_own_files(tmp_path, write_image):
  """A folder of captioned images, evaluated on another."""
  for folder in ("train", "val"):
    for i, colour in enumerate(("red", "green", "blue") * 4):
      write_image(tmp_path / folder / f"{i}.tif", colour)
      (tmp_path / folder / f"{i}.txt").write_text(f"{colour} {i}")
  data = f"data={tmp_path}/train,val={tmp_path}/val"
  train(smallest(f"steps=2,batch=8,{data}"), tmp_path / "run")
  evaluated = sorted(f.name for f in (tmp_path / "run/evals").glob("*.json"))
  assert evaluated == ["val_retrieval_2.json"]


def test_held_out_data_that_are_trained_on_warn(tmp_path, write_image, caplog):
  for name in ("a", "b/c/d"):
    write_image(tmp_path / f"{name}.png", "red")
    (tmp_path / f"{name}.txt").write_text(name)
  data = f"batch=8,data={tmp_path},val={tmp_path}/b"
  run = open_run(smallest(data), tmp_path / "run")
  (hook := EvaluationHook()).open(run)
  # Captioned images are not classes.
  assert "val_zero_shot" in run.config.evals
  assert [*hook.evaluators] == ["val_retrieval"]
  assert f"overlaps evaluation data: {tmp_path}/b." in caplog.text
  open_evaluators(run.config, {})
  assert "This run has no evaluations. Name held-out data" in caplog.text


@pytest.mark.parametrize(
  ("size", "warned"), [(72, []), (80, ["length=50"]), (128, ["50", "30"])]
)
def test_sources_smaller_than_their_share_of_a_batch_warn(
  tmp_path, caplog, size, warned
):
  # The sources have 50 and 30 records and weights 1 and 0.5.
  open_run(smallest(batch_size=size), tmp_path)
  actual = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
  assert len(actual) == len(warned)
  for message, part in zip(actual, warned, strict=True):
    assert f"A batch of {size}" in message and part in message


def test_a_weight_is_a_number_or_a_schedule(tmp_path):
  config = smallest().to_dict()
  config["objectives"]["delayed"] = dict(
    type="contrastive",
    init_bias=-2.0,
    weight=dict(value=0.5, start_percent=50, ramp_steps=3),
  )
  weights = open_run(config, tmp_path).spec.weights
  assert weights["delayed"] == ObjectiveWeight(0.5, start=6, ramp=3)
  assert weights["contrastive"] == ObjectiveWeight(1.0)
  # 80 records in batches of 16.
  config["objectives"]["delayed"]["weight"] = dict(start_epochs=0.6)
  weights = open_run(config, tmp_path).spec.weights
  assert weights["delayed"] == ObjectiveWeight(1.0, start=3)


def test_a_changed_config_is_recorded_with_a_warning(tmp_path, caplog):
  save_config(open_run(smallest(), tmp_path))
  assert not caplog.records
  save_config(open_run(smallest(seed=4), tmp_path))
  (record,) = caplog.records
  assert "seed: 3 -> 4" in record.getMessage()
  assert "batch_size:" not in record.getMessage()
  for name, seed in (("config.json.old", 3), ("config.json", 4)):
    assert json.loads((tmp_path / name).read_text())["seed"] == seed


def test_what_a_killed_session_left_is_replaced(tmp_path, monkeypatch):
  source, workdir = tmp_path / "c4.model", tmp_path / "run"
  source.write_bytes(b"whole")
  run = dataclasses.replace(
    open_run(smallest(), workdir),
    tokenizer=types.SimpleNamespace(path=source),
  )

  def copy_a_part(_, target):
    target.write_bytes(b"wh")
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(shutil, "copyfile", copy_a_part)
    with pytest.raises(KeyboardInterrupt):
      save_config(run)
  dead = atomic.current_process()._replace(pid=10**7)
  (workdir / f".alive.{dead}.0.tmp").write_bytes(b"{")
  save_config(run)
  assert (workdir / "tokenizer" / "c4.model").read_bytes() == b"whole"
  assert not list(workdir.rglob("*.tmp"))


@pytest.mark.slow
def test_a_config_deleted_during_a_run_is_written_again(tmp_path, monkeypatch):
  workdir = tmp_path / "run"

  def run(self, encoder):
    if not (workdir / "old").exists():
      (workdir / "config.json").rename(workdir / "old")
    return Result({}, {})

  monkeypatch.setattr(Retrieval, "run", run)
  config = smallest("steps=4,save=4")
  config.evals.retrieval.every_steps = 3
  train(config, workdir)
  new, old = (workdir / name for name in ("config.json", "old"))
  assert new.read_bytes() == old.read_bytes()
