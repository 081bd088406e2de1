"""Four real processes train, evaluate, save and resume like one."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
import trainings

pytestmark = pytest.mark.slow

ARG = "steps=8,save=4"


def together(workdir, count, *args, devices=1, arg=ARG):
  """Trains to the end in `count` processes."""
  options = dict(devices=devices, arg=arg)
  with trainings.together(workdir, count, *args, **options) as running:
    for process in running:
      trainings.finish(process, workdir)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("single") / "run"
  trainings.train(workdir, devices=4, arg=ARG)
  return workdir


def figures(workdir):
  last = trainings.rows(workdir)[-1]
  return {k: v for k, v in last.items() if k.startswith("retrieval/")}


def assert_same_curve(workdir, expected):
  actual, wanted = trainings.losses(workdir), trainings.losses(expected)
  assert actual.keys() == wanted.keys()
  for step, loss in wanted.items():
    assert actual[step] == pytest.approx(loss, abs=1e-5), step


def but_key_biases(name, value):
  """A key's bias moves no attention, and Adam follows its rounding errors."""
  if not name.endswith("attention/qkv/bias"):
    return value
  # Columns ordered (head, q|k|v, dim), of two heads.
  return value.reshape(-1, 2, 3, value.shape[-1] // 6)[:, :, [0, 2]]


@pytest.mark.long
def test_four_processes_resume_a_run_of_two(single, tmp_path):
  """And equal one process that was not interrupted."""
  workdir = tmp_path / "run"
  keep = "--config.checkpoint.keep=8"
  together(workdir, 2, keep, devices=2, arg="steps=8,save=1")
  # As if the two processes had been stopped after four steps.
  for step in (5, 6, 7, 8):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  together(workdir, 4, arg=ARG)
  assert "Resumed" in trainings.log(workdir)
  assert_same_curve(workdir, single)
  assert figures(workdir) == figures(single) and figures(single)
  actual, wanted = trainings.params(workdir), trainings.params(single)
  assert actual.keys() == wanted.keys()
  for name, value in wanted.items():
    # Adam divides by the root of squares that are near zero at first.
    np.testing.assert_allclose(
      *(but_key_biases(name, x) for x in (actual[name], value)),
      atol=1e-4,
      err_msg=name,
    )


def test_compilation_cache_is_reused(tmp_path):
  cache = tmp_path / "compiled"

  def updates():
    return sorted(cache.glob("jit_update-*-cache"))

  for name in ("a", "b"):
    arg = "steps=2,save=2"
    trainings.train(tmp_path / name, f"--compile_cache={cache}", arg=arg)
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
    (0, signal.SIGSTOP, "process 0 has not answered for 10 s"),
    pytest.param(
      1,
      signal.SIGSTOP,
      "process 1 has not answered for 10 s",
      marks=pytest.mark.long,
    ),
  ],
)
def test_the_others_exit_when_a_process_is_lost(
  tmp_path, lost, number, message
):
  workdir = tmp_path / "run"
  options = ("--config.watchdog.peer_seconds=10",)
  long = "steps=100000,save=100000"
  with trainings.together(workdir, 2, *options, arg=long) as running:
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


def test_the_service_aborts_the_others_when_process_0_is_killed(tmp_path):
  workdir = tmp_path / "run"
  long = "steps=100000,save=100000"
  with trainings.together(workdir, 2, arg=long) as running:
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


AUTO_REMAT = """
import dataclasses, json, sys
from mtv_jax.cli import train
from mtv_jax.cli.main import run_command
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import compile as compile_lib, remat

describe, choose_remat = topologies.describe_local, train.choose_remat
savings = [
  remat.Saving(view, name, 100, flops)
  for view in ("image", "caption")
  for name, flops in (("mlp_hidden", 200.0), ("qkv", 100.0))
]


def describe_local():
  topology = describe()
  limit = int(budget / remat.SHARE) + 1
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
remat.list_savings = lambda plan: savings
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


def test_auto_remat_is_that_of_all_processes_and_of_the_first_session(
  tmp_path,
):
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
