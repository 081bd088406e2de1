"""Studies in a folder: refusals, shares, leases, failures, kills."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from xla_options import xla_flags

from mtv_jax.cli.evaluate import Flags, add_study_runs
from mtv_jax.cli.study import write_report
from mtv_jax.studies import expand, runner
from mtv_jax.studies.expand import Study, StudyRun
from mtv_jax.studies.statistics import read_study
from mtv_jax.train import workdir
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.leases import open_leases

ROOT = pathlib.Path(__file__).resolve().parents[2]


def make_study(count=3, **settings):
  settings = dict(batch_size=4, evals={"retrieval": {}}, seed=0) | settings
  runs = [
    StudyRun(f"a{i}-s0", f"a{i}", 0, ("seed=0",), 5, settings)
    for i in range(count)
  ]
  return Study("ladder", "nowhere.py", "a0", "images", 1.0, tuple(runs))


def write_run(folder, run, top1=0.5):
  """The files of a finished run."""
  path = folder / "runs" / run.name
  (path / "checkpoints" / str(run.steps)).mkdir(parents=True)
  (path / "evals").mkdir()
  (path / "config.json").write_text(json.dumps(run.settings))
  result = dict(
    metrics={"top1": top1, "rmse": 2.0}, protocol={}, chance={"top1": 0.25},
    units={"rmse": "m"}, lower=["rmse"], errors={"top1": 0.01},
  )  # fmt: skip
  file = path / "evals" / f"retrieval_{run.steps}.json"
  content = dict(encoder="x", weights="student", evals={"retrieval": result})
  file.write_text(json.dumps(content))
  np.savez(file.with_suffix(".npz"), top1=np.full(400, top1))


def test_other_settings_are_refused_and_more_runs_are_not(tmp_path):
  study = make_study(2)
  runner.write(tmp_path, study)
  runner.write(tmp_path, study)
  assert runner.read(tmp_path) == study
  for other, message in (
    (make_study(2, optim={"lr": 0.1}), "optim: absent -> {'lr': 0.1}"),
    (make_study(1), "a1-s0: not among the runs"),
    (dataclasses.replace(study, match="flops"), "match: 'images' -> 'flops'"),
    (dataclasses.replace(study, baseline="a1"), "baseline: 'a0' -> 'a1'"),
  ):
    with pytest.raises(ConfigError, match=message):
      runner.write(tmp_path, other)
  assert runner.read(tmp_path) == study
  runner.write(tmp_path, make_study(3))
  assert len(runner.read(tmp_path).runs) == 3
  with pytest.raises(InputError, match="is not a study"):
    runner.read(tmp_path / "runs")
  write_run(tmp_path, study.runs[0])
  with pytest.raises(ConfigError, match="is the folder of a run"):
    runner.write(tmp_path / "runs" / "a0-s0", study)


def test_the_family_of_tests_stays_that_of_the_first_command(tmp_path):
  def make(count, comparisons=()):
    study = make_study(count)
    family = expand.ComparisonFamily.of_runs(study.runs, comparisons)
    return dataclasses.replace(study, family=family)

  for count in (2, 3, 3):
    runner.write(tmp_path, make(count))
  assert len(runner.read(tmp_path).runs) == 3
  assert runner.read(tmp_path).family.comparisons == (("a1", "a0"),)
  assert runner.read(tmp_path).family.seeds == {"a0": 1, "a1": 1}
  with pytest.raises(ConfigError, match="family: .*'a1', 'a0'"):
    runner.write(tmp_path, make(3, [("a0", "a1")]))
  # The second test is of arms that the first command had.
  runner.write(tmp_path / "one", make(3, [("a1", "a0")]))
  with pytest.raises(ConfigError, match="family: .*'a2', 'a0'"):
    runner.write(tmp_path / "one", make(3))
  # Written after a run has started.
  write_run(tmp_path / "two", make(2).runs[0])
  runner.write(tmp_path / "two", make(2))
  assert runner.read(tmp_path / "two").family.num_started_runs == 1


WHOLE = make_study(2).to_dict()
FIRST, SECOND = WHOLE["runs"]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "Remove it"),
    ("[" * 10**5, "Remove it"),
    ("[]", "has format None"),
    ('{"format": 1}', "not a study"),
    ({"kind": "lader"}, "Did you mean 'ladder'"),
    ({"budget": "half"}, "budget is 'half'"),
    ({"runs": [{**FIRST, "steps": "5"}]}, r"runs\[0\].steps is '5'"),
    ({"runs": [FIRST, {**SECOND, "arm": 3}]}, r"runs\[1\].arm is 3"),
    ({"runs": [{**FIRST, "settings": "x"}]}, "settings is 'x'"),
    ({"runs": [FIRST, FIRST]}, "the same name"),
    ({"family": [1]}, "family is"),
    ({"family": {"comparisons": [["a0", "b"]]}}, "comparisons is 'b'"),
    ({"family": {"comparisons": [3]}}, "is not a study"),
    ({"baseline": "a9"}, "baseline is 'a9'"),
    ({"runs": [{**FIRST, "settings": {"seed": 1}}]}, r"runs\[0\].seed is not"),
    ({"runs": [FIRST, {**SECOND, "arm": "a0"}]}, "the same arm and seed"),
  ],
)
def test_a_damaged_study_is_refused(tmp_path, text, message):
  text = text if isinstance(text, str) else json.dumps(WHOLE | text)
  (tmp_path / "study.json").write_text(text)
  with pytest.raises(InputError, match=message) as caught:
    runner.read(tmp_path)
  assert str(caught.value).startswith(str(tmp_path))


def test_flops_are_those_of_this_code(tmp_path):
  study = make_study(1, total_steps=5)
  study = dataclasses.replace(
    study, match="flops", costs={"a": 2.0}, counted_by=expand.code_version()
  )
  assert runner.known_costs(tmp_path) == {}
  runner.write(tmp_path, study)
  assert runner.known_costs(tmp_path) == {"a": 2.0}
  other = make_study(1, total_steps=6)
  other = dataclasses.replace(other, match="flops", counted_by="0.0.9-a")
  with pytest.raises(ConfigError, match="by another version"):
    runner.write(tmp_path, other)
  # The new code counts equally: the study resumes.
  runner.write(tmp_path, dataclasses.replace(study, counted_by="0.0.9-a"))
  assert runner.known_costs(tmp_path) == {}
  # Written by a version that did not store it.
  fields = json.loads((tmp_path / "study.json").read_text())
  del fields["counted_by"]
  (tmp_path / "study.json").write_text(json.dumps(fields))
  assert runner.read(tmp_path).costs == {"a": 2.0}
  assert runner.known_costs(tmp_path) == {}


def test_only_finished_runs_of_the_same_settings_are_read(tmp_path):
  study = make_study(3)
  runner.write(tmp_path, study)
  for i, run in enumerate(study.runs[:2]):
    write_run(tmp_path, run, 0.5 + 0.1 * i)
  read = read_study(tmp_path)
  assert read.unfinished == ("a2-s0",)
  values = read.measurements.values
  assert values["a0"][0]["retrieval/top1"] == 0.5
  assert values["a1"][0]["retrieval/top1"] == 0.6 and values["a2"] == {}
  assert read.measurements.errors["a0"][0] == {"retrieval/top1": 0.01}
  assert read.measurements.resamples["a1"][0]["retrieval/top1"].shape == (400,)
  top1, rmse = read.metrics
  assert (top1.name, top1.unit, top1.lower) == ("retrieval/top1", "%", False)
  assert (rmse.unit, rmse.lower, rmse.chance) == ("m", True, None)
  path = tmp_path / "runs" / "a0-s0"
  # `mtv-jax evaluate --study` evaluates the finished runs further.
  lists = dict(data=[], set=[], llava=[])
  args = add_study_runs(Flags(study=str(tmp_path), encoder=[], **lists))
  runs = [f"a{i}-s0={tmp_path}/runs/a{i}-s0" for i in range(2)]
  assert [*args.encoder] == runs
  text = (path / "evals" / "retrieval_5.json").read_text()
  file = pathlib.Path(args.output) / "encoders" / "a0-s0" / "vqa.json"
  file.parent.mkdir(parents=True)
  content = json.loads(text.replace('"retrieval"', '"vqa"'))
  file.write_text(json.dumps(content | {"name": "a0-s0"}))
  # Of a run whose name gives the same folder.
  file.with_name("knn.json").write_text(json.dumps(content | {"name": "a0 s0"}))
  read = read_study(tmp_path)
  assert read.measurements.values["a0"][0]["vqa/top1"] == 0.5
  assert "vqa/top1" not in read.measurements.values["a1"][0]
  assert read.metrics[:2] == (top1, rmse) and len(read.metrics) == 4
  for wrong in (Flags(), Flags(study="a", encoder=["b"])):
    with pytest.raises(ConfigError, match="either --encoder or --study"):
      add_study_runs(wrong)
  # Its last checkpoint is missing, or its settings differed.
  (path / "checkpoints" / "5").rmdir()
  assert "a0-s0" in read_study(tmp_path).unfinished
  changed = {**study.runs[0].settings, "batch_size": 8}
  (path / "config.json").write_text(json.dumps(changed))
  with pytest.raises(InputError, match="batch_size: 4 -> 8"):
    read_study(tmp_path)


def test_damaged_results_are_named_and_give_no_report(tmp_path, capsys):
  study = make_study(2)
  runner.write(tmp_path, study)
  for run in study.runs:
    write_run(tmp_path, run)
  lines = []
  assert write_report(tmp_path, lines.append) and "wrote" in lines[0]
  stem = tmp_path / "runs" / "a1-s0" / "evals" / "retrieval_5"
  stem.with_suffix(".npz").write_bytes(b"PK")
  assert not write_report(tmp_path, lines.append)
  (line,) = capsys.readouterr().err.splitlines()
  assert f"no report: {stem}.npz can't be read" in line
  stem.with_suffix(".npz").unlink()
  text = stem.with_suffix(".json").read_text()
  stem.with_suffix(".json").write_text(text.replace('"retrieval"', '"other"'))
  with pytest.raises(InputError, match="lacks results of 'retrieval'"):
    read_study(tmp_path)


def test_index_takes_one_run_or_a_share():
  runs = make_study(7).runs

  def names(index):
    return [run.arm for run in runner.select_runs(runs, index)]

  assert len(names(None)) == 7
  assert names("2") == ["a2"] and names("1/3") == ["a1", "a4"]
  shares = [name for i in range(3) for name in names(f"{i}/3")]
  assert sorted(shares) == names(None)
  for wrong in ("7", "3/3", "0/0", "a", "1/", "-1"):
    with pytest.raises(ConfigError, match="--index"):
      runner.select_runs(runs, wrong)


@pytest.fixture
def trainings(monkeypatch):
  """Names of the runs that were trained, by a command that trains nothing."""
  names = []

  def train(folder, study, run, log):
    names.append(run.name)
    if run.name == "a1-s0":
      return "exit code 1"
    write_run(folder, run)
    return None

  monkeypatch.setattr(runner, "_train", train)
  return names


def test_a_failed_run_does_not_stop_the_others(tmp_path, trainings):
  study = make_study(3)
  write_run(tmp_path, study.runs[0])
  status = runner.run_study(tmp_path, study)
  assert trainings == ["a1-s0", "a2-s0"]
  assert status.finished == ["a0-s0", "a2-s0"]
  assert status.failed == {"a1-s0": "exit code 1"}
  # The failed one is tried again.
  runner.run_study(tmp_path, study, index="1")
  assert trainings[2:] == ["a1-s0"]


def test_runs_share_compiled_programs(tmp_path, monkeypatch):
  caches, start = [], subprocess.Popen

  def popen(command, **_):
    caches.extend(arg for arg in command if "compile_cache" in arg)
    return start(["true"])

  monkeypatch.setattr(subprocess, "Popen", popen)
  name = "jax_compilation_cache_dir"
  old = getattr(jax.config, name)
  try:
    for own in (None, "/cache"):
      jax.config.update(name, own)
      runner.run_study(tmp_path, make_study(1))
  finally:
    jax.config.update(name, old)
  folders = tmp_path / "compiled", "auto"
  assert caches == [f"--compile_cache={folder}" for folder in folders]


def test_a_run_that_its_bound_ended_says_so(tmp_path, monkeypatch):
  def train(folder, study, run, log):
    (folder / "runs" / run.name / "end.json").write_text('{"reason": "low"}')

  monkeypatch.setattr(runner, "_train", train)
  status = runner.run_study(tmp_path, make_study(1))
  assert "stopped by the bound of an evaluation: low" in status.failed["a0-s0"]


@pytest.mark.parametrize("finishes", [False, True])
def test_a_leased_run_is_left_to_its_process(
  tmp_path, trainings, monkeypatch, finishes
):
  """The last of two processes has all results for its report."""
  study, lines, train = make_study(3), [], runner._train

  def train_both(folder, study, run, log):
    if run.name == "a1-s0" and finishes:
      write_run(folder, study.runs[0])  # By the other process.
    return train(folder, study, run, log)

  monkeypatch.setattr(runner, "_train", train_both)
  (tmp_path / "runs").mkdir()
  with open_leases(tmp_path / "runs").acquire("a0-s0"):
    status = runner.run_study(tmp_path, study, log_fn=lines.append)
  assert trainings == ["a1-s0", "a2-s0"]
  assert f"process {os.getpid()}" in lines[0]
  assert list(status.leased) == ([] if finishes else ["a0-s0"])
  assert ("a0-s0" in status.finished) == finishes


def test_a_locked_run_is_waited_for(tmp_path, trainings, monkeypatch):
  """A runner was killed, and its training process continues."""
  study, lines = make_study(1), []
  lock = workdir.lock_workdir(tmp_path / "runs" / "a0-s0")
  lock.__enter__()
  waits = []

  def sleep(seconds):
    assert trainings == []
    waits.append(seconds)
    if len(waits) == 2:
      lock.__exit__(None, None, None)

  monkeypatch.setattr(runner.time, "sleep", sleep)
  runner.run_study(tmp_path, study, log_fn=lines.append)
  assert trainings == ["a0-s0"] and len(waits) == 2
  assert sum("Waiting" in line for line in lines) == 1


RECIPE = """
from mtv_jax.config.recipes import read_config


def get_config(arg=None):
  config = read_config("{smallest}:steps=6,save=2")
  config.objectives = dict(
    contrastive=dict(init_bias=-2.0), depth=dict(features=8, channels=(8,) * 4)
  )
  config.data.ops = "decode|canvas(32)|caption(16)|depth(16)"
  return config
"""


@pytest.fixture
def start():
  """Starts a study; kills processes that outlive the test."""
  started = []

  def start(recipe, output):
    env = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": xla_flags(1),
      "PYTHONPATH": str(ROOT),
    }
    code = "import sys; from mtv_jax.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
      [sys.executable, "-c", code, "study", "ladder",
       f"--config={recipe}", f"--output={output}"],
      cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True, start_new_session=True,
    )  # fmt: skip
    started.append(process)
    return process

  yield start
  for process in started:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def read_pages(output):
  """The report's pages and charts by name, without the study's folder."""
  files = [*output.glob("report.*"), *output.glob("charts/*.svg")]
  return {
    str(file.relative_to(output)): file.read_text().replace(str(output), "")
    for file in files
  }


def steps_logged(output):
  return sum(
    len(file.read_text().splitlines())
    for file in output.glob("runs/*/metrics.jsonl")
  )


# SIGTERM, or a kill of runner and run, or of only the runner.
@pytest.mark.long
@pytest.mark.parametrize(
  "kills", [("term",), ("group", "runner", "term")], ids=len
)
def test_a_study_killed_at_random_moments_gives_the_same_report(
  tmp_path, start, kills
):
  recipe = tmp_path / "recipe.py"
  smallest = ROOT / "tests" / "configs" / "smallest.py"
  recipe.write_text(RECIPE.format(smallest=smallest))
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  process = start(recipe, whole)
  text, _ = process.communicate(timeout=500)
  assert process.returncode == 0, text
  base = int(os.environ.get("MTV_JAX_SEED", time.time_ns()))
  rng = random.Random(base)
  lines = 13 // len(kills)  # Log lines of the two runs.
  for i, kill in enumerate(kills):
    at = rng.randint(i * lines + 1, (i + 1) * lines)
    print(f"MTV_JAX_SEED={base}: {kill} after {at} lines")
    process = start(recipe, killed)
    while steps_logged(killed) < at and process.poll() is None:
      time.sleep(0.005)
    if kill == "term":
      process.terminate()
    elif kill == "group":
      os.killpg(process.pid, signal.SIGKILL)
    else:
      process.kill()
    text, _ = process.communicate(timeout=200)
    assert process.returncode in {
      # While it waits for a process of a killed runner, SIGTERM ends it.
      "term": (143, -15, 0), "group": (-9, 0), "runner": (-9, 0)
    }[kill], text  # fmt: skip
  process = start(recipe, killed)
  text, _ = process.communicate(timeout=500)
  assert process.returncode == 0, text
  read = [read_study(folder) for folder in (whole, killed)]
  assert read[0].unfinished == read[1].unfinished == ()
  assert read[0].study == read[1].study
  assert read[0].metrics == read[1].metrics
  assert read[0].measurements.values == read[1].measurements.values
  assert read[0].measurements.errors == read[1].measurements.errors
  for arm in ("vl", "depth"):  # The config's seed is 3.
    pairs = [r.measurements.resamples[arm][3] for r in read]
    for name, array in pairs[0].items():
      np.testing.assert_array_equal(array, pairs[1][name], err_msg=name)
  pages = [read_pages(folder) for folder in (whole, killed)]
  assert {"report.html", "report.md"} < pages[0].keys()
  assert pages[0].keys() == pages[1].keys()
  for name, text in pages[0].items():
    assert text == pages[1][name], name
