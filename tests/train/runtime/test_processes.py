"""Real processes: killed, resumed, lost and failing ones, agreement."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import time

import dataset_samples
import numpy as np
import pytest
import trainings

pytestmark = pytest.mark.slow

ENDLESS = "steps=100000,save=100000"


@pytest.mark.long
def test_compilation_cache_is_reused(tmp_path):
  cache = tmp_path / "compiled"

  def updates():
    return sorted(cache.glob("*/jit_update-*-cache"))

  for name in ("a", "b"):
    arg = "steps=2,save=2"
    options = trainings.NO_EVALS, f"--compile_cache={cache}"
    trainings.train(tmp_path / name, *options, arg=arg)
    # The second run finds it; otherwise it would add its own.
    assert len(updates()) == 1
  seconds = [_timing(tmp_path / name)["compile"] for name in ("a", "b")]
  assert seconds[1] < seconds[0]


def _timing(workdir):
  file = workdir / "checkpoints" / "2" / "timing" / "metadata"
  return json.loads(file.read_text())


@pytest.mark.parametrize(
  ("lost", "number", "message"),
  [
    (1, signal.SIGKILL, "another process of the run is lost"),
    *(
      pytest.param(
        *(lost, signal.SIGSTOP, f"process {lost} has not answered for 10 s"),
        marks=pytest.mark.long,
      )
      for lost in range(2)
    ),
  ],
)
def test_the_others_exit_when_a_process_is_lost(
  tmp_path, lost, number, message
):
  workdir = tmp_path / "run"
  options = ("--config.watchdog.peer_seconds=10",)
  with trainings.together(workdir, 2, *options, arg=ENDLESS) as running:
    trainings.wait_for_step(workdir, 3, running)
    running[lost].send_signal(number)
    start = time.monotonic()
    code = running[1 - lost].wait(timeout=60)
    seconds = time.monotonic() - start
  log = trainings.log(workdir)
  assert code == 75, log
  assert message in log and "Traceback" not in log
  assert "Check failure" not in log  # The service's own abortion.
  assert seconds < 30


@pytest.mark.parametrize(
  "process", [pytest.param(0, marks=pytest.mark.long), 1]
)
def test_a_process_without_its_others_exits(tmp_path, process):
  workdir = tmp_path / "run"
  with trainings.together(workdir, 2, "--connect_seconds=5") as running:
    running[1 - process].kill()
    code = running[process].wait(timeout=120)
  log = trainings.log(workdir)
  assert code == 75, log
  assert "Not all processes have connected within 5 s: one" in log
  assert "Check failure" not in log and "Traceback" not in log


@pytest.mark.long
def test_the_service_aborts_the_others_when_process_0_is_killed(tmp_path):
  workdir = tmp_path / "run"
  with trainings.together(workdir, 2, arg=ENDLESS) as running:
    trainings.wait_for_step(workdir, 3, running)
    running[0].kill()
    code = running[1].wait(timeout=60)
  log = trainings.log(workdir)
  # 75 if a collective has failed before.
  assert code in (-signal.SIGABRT, 75), log
  assert "JAX distributed service" in log or "run is lost" in log


@pytest.mark.parametrize(
  "failing", [0, pytest.param(1, marks=pytest.mark.long)]
)
def test_a_process_that_fails_alone_tells_why_and_exits(
  tmp_path, monkeypatch, failing
):
  monkeypatch.setenv("FAIL_IN", str(failing))
  workdir = tmp_path / "run"
  options = ("--config.watchdog.peer_seconds=20",)
  # A save is in progress, in which both take part.
  with trainings.together(
    workdir,
    2,
    *options,
    config=trainings.CONFIGS / "unreliable.py",
    arg="save=4",
  ) as running:
    codes = [process.wait(timeout=150) for process in running]
  log = trainings.log(workdir)
  assert (codes[failing], codes[1 - failing]) == (1, 75), log
  assert "\ntrain: too many records are bad\n" in log
  # Whichever message the second process sees first.
  assert "failed: CorruptDataError" in log or "run is lost" in log
  assert "Check failure" not in log and "Traceback" not in log


# The training command in another folder, which relative paths refer to.
ELSEWHERE = """
import os, runpy, sys
import mtv_jax
os.chdir(sys.argv.pop(1))
runpy.run_module("mtv_jax.main", run_name="__main__", alter_sys=True)
"""


def start_apart(tmp_path, tars, **options):
  """Starts processes in folders of so many tars each; returns a context."""
  image = dataset_samples.image_bytes((9, 9, 9), "jpeg")
  for process, count in enumerate(tars):
    folder = tmp_path / f"{process}"
    folder.mkdir(exist_ok=True)
    for tar in range(count):
      records = {f"{tar}{i}": {"jpg": image, "txt": b"a dog"} for i in range(9)}
      dataset_samples.write_tar(folder / f"{tar}.tar", records)

  def start(workdir, *args):
    process = int("--process=1" in args)
    own = [
      f"--config.{key}={values[process]}" for key, values in options.items()
    ]
    folder = str(tmp_path / f"{process}")
    code = ["-c", ELSEWHERE, folder, f"--workdir={folder}"]
    return trainings.spawn(workdir, *code, *args, *own)

  data = "--config.data.train=[dict(type='webdataset', path='*.tar')]"
  arguments = (f"--config={trainings.CONFIG}", data)
  return trainings.together(tmp_path / "run", 2, *arguments, start=start)


def test_processes_that_differ_exit_with_one_sentence(smallest_run, tmp_path):
  for process, steps in enumerate([(4, 8, 12), (4, 8)]):
    for step in steps:
      name = f"checkpoints/{step}"
      shutil.copytree(smallest_run / name, tmp_path / f"{process}" / name)
  with start_apart(tmp_path, tars=(2, 1), seed=(3, 4)) as running:
    codes = [process.wait(timeout=150) for process in running]
  log = trainings.log(tmp_path / "run")
  assert codes == [1, 1], log
  assert "Traceback" not in log
  lines = trainings.problems(tmp_path / "run")
  assert len(lines) == 2 and len(set(lines)) == 1, log
  assert re.sub("'[^']+'", "_", lines[0]) == (
    "train: The processes of this run differ in"
    " config.seed (3 on process 0; 4 on process 1),"
    " data[0].name (_ on process 0; _ on process 1),"
    " data[0].records (18 on process 0; 9 on process 1),"
    " data[0].digest (_ on process 0; _ on process 1),"
    " checkpoints ([4, 8, 12] on process 0; [4, 8] on process 1). Start all of"
    " them with the same command, code, data and workdir."
  )


def test_a_process_without_data_ends_the_others(tmp_path):
  with start_apart(tmp_path, tars=(1, 0)) as running:
    codes = [process.wait(timeout=150) for process in running]
  log = trainings.log(tmp_path / "run")
  assert codes == [75, 1], log
  assert "train: '*.tar' matches no file" in log
  assert "Traceback" not in log


@pytest.mark.long
def test_scenes_as_only_evaluation_of_other_data_are_refused(tmp_path):
  with start_apart(tmp_path, tars=(1, 1)) as running:
    codes = [process.wait(timeout=150) for process in running]
  log = trainings.log(tmp_path / "run")
  assert codes == [2, 2], log
  refused = "train: This run would be evaluated only on rendered scenes (retr"
  assert log.count(refused) == 2 and "--allow_scene_evals" in log


AUTO_REMAT = """
import dataclasses, json, sys
from mtv_jax.cli import train
from mtv_jax.cli.main import run_command
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import compile as compile_lib, search

describe, choose_remat = topologies.describe_local, train.choose_remat
savings = [
  search.Saving(view, name, 100, flops)
  for view in ("image", "caption")
  for name, flops in (("mlp_hidden", 200.0), ("qkv", 100.0))
]


def describe_local():
  topology = describe()
  limit = int(budget / search.SHARE) + 1
  chip = dataclasses.replace(topology.chip, kind="chip", hbm_bytes=limit)
  return dataclasses.replace(topology, chip=chip)


def compile_step(plan, **options):
  # Of process 1, whose kernels need more, half of the arrays fit.
  choice = plan.config.model.remat
  compiled.append(choice)
  count = choice.count("mlp_hidden") + choice.count("qkv")
  peak = 1000 + 100 * count * (1 + process)
  return compile_lib.CompileResult(compile_lib.Memory(0, 0, 0, peak, None))


def choose(*args):
  config = choose_remat(*args)
  resolved.append(config.model.remat)
  return config


topologies.describe_local = describe_local
compile_lib.compile_step = compile_step
search.list_savings = lambda plan: savings
train.choose_remat = choose
compiled, resolved, statuses = [], [], []
for budget, steps in ((1450, 3), (9000, 4)):
  statuses.append(run_command("train", [
    f"--config={sys.argv[1]}:steps={steps},save=3",
    f"--workdir={sys.argv[2]}",
    "--config.model.remat=auto",
    "--config.log.spikes=0",
    "--config.evals.retrieval=None",
  ]))
  compiled.append("end of session")
with open(f"{sys.argv[2]}.{process}.json", "w") as file:
  json.dump([statuses, compiled, resolved], file)
"""


@pytest.mark.long
def test_auto_remat_is_that_of_all_processes_and_of_the_first_session(tmp_path):
  """A choice that fits both processes, even if one alone would save more."""
  workdir = tmp_path / "run"
  trainings.run_pair(AUTO_REMAT, str(trainings.CONFIG), str(workdir), devices=1)
  first, second = (
    json.loads((tmp_path / f"run.{i}.json").read_text()) for i in range(2)
  )
  assert first == second
  statuses, compiled, resolved = first
  assert statuses == [0, 0]
  best = "full|caption=full|image=qkv,mlp_hidden"
  assert resolved == [f"auto:{best}"] * 2
  # The second session has memory for all arrays, and searches no more.
  all_arrays = "full|caption=qkv,mlp_hidden|image=qkv,mlp_hidden"
  ends = ["end of session"] * 2
  assert compiled == ["full", all_arrays, best, *ends]
  recorded = json.loads((workdir / "config.json").read_text())
  assert recorded["model"]["remat"] == f"auto:{best}"
  assert sorted(trainings.losses(workdir)) == [1, 2, 3, 4]


OTHER_THREADS = "--config.data.workers=2", "--config.data.threads=3"


def kill_when(process, condition, timeout=200):
  """SIGKILL as soon as a condition holds."""
  start = time.monotonic()
  while not condition():
    assert process.poll() is None, "the run ended before it could be killed"
    assert time.monotonic() - start < timeout
    time.sleep(0.0005)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL


def assert_same_params(actual, expected):
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)


def step_of_last_line(workdir):
  return max(trainings.losses(workdir), default=0)


@pytest.mark.long
def test_a_clock_that_is_set_back_changes_nothing(
  smallest_run, tmp_path, monkeypatch
):
  """By an hour while the run trains, by a day before it resumes."""
  (library, *_) = [
    *pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
  ] or pytest.skip("no libfaketime")
  clock, workdir = tmp_path / "clock", tmp_path / "run"
  for name, value in dict(
    LD_PRELOAD=library,
    FAKETIME_TIMESTAMP_FILE=clock,
    FAKETIME_DONT_FAKE_MONOTONIC=1,
    FAKETIME_CACHE_DURATION=1,
  ).items():
    monkeypatch.setenv(name, str(value))
  clock.write_text("+0")
  process = trainings.launch(workdir)
  trainings.wait_for_step(workdir, 2, [process])
  clock.write_text("-1h")
  trainings.wait_for_step(workdir, 9, [process])
  process.kill()
  process.wait()
  clock.write_text("-1d")
  trainings.train(workdir)
  assert_same_params(trainings.params(workdir), trainings.params(smallest_run))
  assert trainings.losses(workdir) == trainings.losses(smallest_run)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(9))
def test_resume_after_sigkill_is_bit_exact(smallest_run, tmp_path, seed):
  workdir = tmp_path / "run"
  # MTV_JAX_SEED repeats a failure; by default every run kills elsewhere.
  base = int(os.environ.get("MTV_JAX_SEED", time.time_ns()))
  at = random.Random(base + seed).randint(2, 11)
  process = trainings.launch(workdir, "--config.data.threads=1")
  kill_when(process, lambda: step_of_last_line(workdir) >= at)
  killed_at = step_of_last_line(workdir)
  print(f"MTV_JAX_SEED={base}: killed at {killed_at}, asked for {at}")
  trainings.train(workdir, *OTHER_THREADS)
  assert_same_params(trainings.params(workdir), trainings.params(smallest_run))
  assert trainings.losses(workdir) == trainings.losses(smallest_run)


def test_resume_after_sigkill_during_a_save_is_bit_exact(
  smallest_run, tmp_path
):
  workdir = tmp_path / "run"
  folder = workdir / "checkpoints"

  def being_written():
    return folder.exists() and any(
      not path.name.isdecimal() and any(path.iterdir())
      for path in folder.iterdir()
      if path.is_dir() and path.exists()
    )

  # At the second save an older checkpoint exists to fall back to.
  process = trainings.launch(workdir)
  kill_when(
    process, lambda: (folder / "4").exists() and _quietly(being_written)
  )
  assert not (folder / "12").exists()
  trainings.train(workdir, *OTHER_THREADS, trainings.NO_EVALS)
  assert "Resumed" in trainings.log(workdir)
  assert_same_params(trainings.params(workdir), trainings.params(smallest_run))


def _quietly(condition):
  """Folders vanish while they are looked at: the writer renames them."""
  try:
    return condition()
  except FileNotFoundError:
    return False


def figures(workdir):
  last = trainings.rows(workdir)[-1]
  return {k: v for k, v in last.items() if k.startswith("retrieval/")}


def test_a_run_resumes_on_two_processes(tmp_path):
  single, workdir = tmp_path / "single", tmp_path / "run"
  trainings.train(single, devices=2)
  shutil.copytree(single, workdir)
  # As if the run had been stopped after four steps.
  for step in (8, 12):
    shutil.rmtree(workdir / "checkpoints" / f"{step}")
  trainings.pair(workdir, devices=1)
  text = trainings.log(workdir)
  assert "Resumed" in text and "Gloo" not in text
  actual, expected = map(trainings.losses, (workdir, single))
  assert actual == pytest.approx(expected, abs=1e-5)
  assert figures(workdir) == figures(single) != {}


@pytest.mark.long
def test_four_processes_resume_a_run_of_two(tmp_path):
  """And equal one process that was not interrupted."""
  single, workdir = tmp_path / "single", tmp_path / "run"
  trainings.train(single, devices=4, arg="steps=8,save=4")

  def train(count, devices, save):
    options = dict(devices=devices, arg=f"steps=8,save={save}")
    keep = "--config.checkpoint.keep=8"
    with trainings.together(workdir, count, keep, **options) as running:
      for process in running:
        trainings.finish(process, workdir)

  train(2, 2, 1)
  # As if the two processes had been stopped after four steps.
  for step in (5, 6, 7, 8):
    shutil.rmtree(workdir / "checkpoints" / f"{step}")
  train(4, 1, 4)
  assert "Resumed" in trainings.log(workdir)
  actual, expected = map(trainings.losses, (workdir, single))
  assert actual == pytest.approx(expected, abs=1e-5)
  assert figures(workdir) == figures(single) != {}
  actual, expected = map(trainings.params, (workdir, single))
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    # A key's bias moves no attention, and Adam follows its rounding errors:
    # columns are ordered (head, q|k|v, dim), of two heads.
    pair = actual[name], value
    if name.endswith("attention/qkv/bias"):
      shape = -1, 2, 3, value.shape[-1] // 6
      pair = (x.reshape(shape)[:, :, [0, 2]] for x in pair)
    # It divides by the root of squares that are near zero at first.
    np.testing.assert_allclose(*pair, rtol=1e-7, atol=1e-4, err_msg=name)
