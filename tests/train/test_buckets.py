"""Runs from a bucket into a bucket, in real processes that are killed."""

import contextlib
import json
import re
import signal
import time

import emulators
import numpy as np
import pytest
import trainings
from label_samples import make_base

from mtv_jax.train import workdir
from mtv_jax.train.runtime import sessions
from mtv_jax.utils import path

STEPS = 12


def rows(file):
  """Lines of metrics.jsonl, without time-dependent values."""
  text = path.read_bytes(path.as_path(file) / "metrics.jsonl").decode()
  return [
    {
      k: v
      for k, v in json.loads(line).items()
      if not re.match("speed/|goodput/", k)
    }
    for line in text.splitlines()
  ]


def arguments(data):
  entry = f'[dict(type="webdataset", path="{data}/*.tar", captions="optional")]'
  return [f"--config.data.train={entry}", "--config.checkpoint.keep=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, gs):
  """Tars in a folder and in a bucket."""
  folder = make_base(tmp_path_factory.mktemp("data"), count=40)
  path.upload_folder(folder, path.as_path(f"{gs}/data"))
  return folder, f"{gs}/data"


def launch(tmp_path, url, *args):
  """The run in a bucket; its log is beside a folder of this machine."""
  return trainings.launch(
    tmp_path / "run", *args, f"--workdir={url}", arg=f"steps={STEPS},save=3"
  )


def has_step(url, step):
  folder = path.as_path(url) / "checkpoints" / f"{step}"
  return path.is_file(folder / "commit_success.txt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_killed_run_in_a_bucket_resumes_bit_exactly(
  data, gs, tmp_path, monkeypatch
):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "cache"))
  local, remote = data
  url = f"{gs}/runs/killed"
  process = launch(tmp_path, url, *arguments(remote))
  deadline = time.monotonic() + 400
  while not has_step(url, 3):
    log = trainings.log(tmp_path / "run")
    assert process.poll() is None and time.monotonic() < deadline, log
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not has_step(url, STEPS)
  assert rows(url)[-1]["step"] < STEPS
  # As on another machine.
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "other"))
  trainings.finish(launch(tmp_path, url, *arguments(remote)), tmp_path / "run")
  assert f"Resumed {url}" in trainings.log(tmp_path / "run")
  whole = tmp_path / "whole"
  trainings.train(whole, *arguments(local), arg=f"steps={STEPS},save=3")
  assert rows(url) == rows(whole)
  actual, expected = trainings.params(url), trainings.params(whole)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
  names = {p.name for p in whole.iterdir() if not p.name.startswith(".")}
  names = {n for n in names if not n.startswith("events.out")}
  assert names <= {*path.list_folder(url)}


@contextlib.contextmanager
def refused(gs, pattern):
  """The emulator refuses to write objects whose names match `pattern`."""
  file = path.as_path(gs) / emulators.REFUSED
  path.write_bytes(file, pattern.encode())
  yield
  path.remove(file)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_run_whose_last_upload_fails_exits_with_1_and_is_uploaded_later(
  gs, tmp_path, monkeypatch
):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "cache"))
  url = f"{gs}/runs/refused"
  args = "--config.total_steps=4", "--config.evals.retrieval.every_steps=2"
  with refused(gs, "^runs/refused/(?!checkpoints|compiled)"):
    assert launch(tmp_path, url, *args).wait(timeout=400) == 1
  log = trainings.log(tmp_path / "run")
  (line,) = [s for s in log.splitlines() if s.startswith("train: ")]
  assert f"{url} lacks files of the run: alive, command.txt, " in line
  folder = workdir.local_folder(url)
  assert f"gcloud storage cp --recursive '{folder}/*' {url}/" in line
  assert "Forbidden" in line and "Traceback" not in log
  assert has_step(url, 4) and not path.exists(f"{url}/metrics.jsonl")
  written = rows(folder)
  trainings.finish(launch(tmp_path, url, *args), tmp_path / "run")
  log = trainings.log(tmp_path / "run")
  assert f"files that {url} lacked" in log and "complete at step 4" in log
  assert rows(url) == written and len(written) >= 4
  exits = [s["exit"] for s in sessions.read_sessions(url)]
  assert exits == ["finished", "finished"]
  assert path.is_file(f"{url}/report.html")


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True])
def test_files_of_an_older_session_replace_none_of_another_machine(
  gs, tmp_path, monkeypatch, caplog, elsewhere
):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path))
  url = f"{gs}/runs/elsewhere{elsewhere}"

  def record(*hosts):
    sessions = [{"started": "now", "host": host} for host in hosts]
    return json.dumps({"sessions": sessions})

  path.write_bytes(path.as_path(url) / "run.json", record("a").encode())
  with (
    refused(gs, "^runs/elsewhere"),
    pytest.raises(workdir.UploadError, match=r"the run: a/b, run\.json\."),
    workdir.open_run_folder(url) as run,
  ):
    (run.folder / "run.json").write_text(record("a", "b"))
    (run.folder / "a").mkdir()
    (run.folder / "a" / "b").write_text("b")
  if elsewhere:
    new = record("a", "c").encode()
    path.write_bytes(path.as_path(url) / "run.json", new)
  with workdir.open_run_folder(url) as run:
    hosts = [s["host"] for s in sessions.read_sessions(run.folder)]
    assert hosts == (["a", "c"] if elsewhere else ["a", "b"])
  assert path.is_file(f"{url}/a/b") != elsewhere
  left = [*run.folder.parent.glob(f"{run.folder.name}.*/a/b")]
  assert len(left) == elsewhere
  assert [f"They are in {f.parents[1]}" in caplog.text for f in left] == (
    [True] * elsewhere
  )


@pytest.mark.slow
def test_the_error_of_a_run_comes_before_that_of_its_upload(
  gs, tmp_path, monkeypatch, caplog
):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path))
  with (
    refused(gs, "^runs/failed"),
    pytest.raises(ValueError, match="bad data"),
    workdir.open_run_folder(f"{gs}/runs/failed") as run,
  ):
    (run.folder / "a").touch()
    raise ValueError("bad data")
  assert "lacks files of the run: a." in caplog.text
