"""A run's folder: its lock, and its files in a bucket."""

import contextlib
import datetime
import functools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import emulators
import numpy as np
import pytest
import trainings
from label_samples import make_base

from mtv_jax.train import workdir
from mtv_jax.train.runtime import sessions
from mtv_jax.utils import atomic, path
from mtv_jax.utils.errors import ConfigError, StorageError


def lock(folder):
  with workdir.lock_workdir(folder):
    pass


def test_a_folder_is_created_and_released(tmp_path):
  folder = tmp_path / "runs" / "ü a"
  with pytest.raises(OSError, match="full"), workdir.lock_workdir(folder):
    raise OSError("full")
  with workdir.lock_workdir(folder):
    assert "process" in (folder / workdir.OWNER).read_text()


def test_a_second_run_is_rejected_until_the_first_exits(tmp_path):
  code = (
    "import sys\nfrom mtv_jax.train import workdir\n"
    "with workdir.lock_workdir(sys.argv[1]):\n"
    "  print('locked', flush=True)\n  sys.stdin.read()"
  )
  other = subprocess.Popen(
    [sys.executable, "-c", code, tmp_path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert other.stdout.readline() == "locked\n"
  match = f"locked by process {other.pid} on"
  with pytest.raises(workdir.LockedError, match=match) as error:
    lock(tmp_path)
  assert error.value.exit_code == 1  # A supervisor tries again.
  # As after a crash.
  other.kill()
  other.communicate()
  lock(tmp_path)


def write_alive(folder, **changes):
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  alive = {"activity": "train", "time": now, "host": "other", "process": 7}
  atomic.write(folder / "alive", json.dumps(alive | changes).encode())


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_run_of_another_host_is_known_by_its_liveness_file(tmp_path, goes_on):
  now = datetime.datetime.now(datetime.UTC).isoformat()
  write = functools.partial(write_alive, tmp_path, time=now)
  write(step=1)
  timer = threading.Timer(0.4, write, kwargs={"step": 2 if goes_on else 1})
  timer.start()
  if goes_on:
    with pytest.raises(workdir.LockedError, match="process 7 on other"):
      workdir.check_other_hosts(tmp_path, seconds=5)
  else:
    workdir.check_other_hosts(tmp_path, seconds=1)
  timer.join()


@pytest.mark.parametrize(
  "changes",
  [
    {"activity": "exit"},
    {"host": socket.gethostname()},
    {"time": "2020-01-01T00:00:00+00:00"},
  ],
)
def test_a_liveness_file_that_no_other_host_writes_is_not_waited_for(
  tmp_path, changes
):
  write_alive(tmp_path, **changes)
  start = time.monotonic()
  workdir.check_other_hosts(tmp_path, seconds=60)
  assert time.monotonic() - start < 5


def test_folders_of_other_content_are_rejected(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ConfigError, match="file is a file; a folder"):
    lock(tmp_path / "file")
  (tmp_path / "link").symlink_to("nothing")
  with pytest.raises(ConfigError, match="link is a file; a folder"):
    workdir.check_workdir(tmp_path / "link" / "run")
  model = tmp_path / "model"
  model.mkdir()
  text = json.dumps({"model_type": "siglip"})
  (model / "config.json").write_text(text)
  with pytest.raises(ConfigError, match="that is not a run's"):
    lock(model)
  assert [p.name for p in model.iterdir()] == ["config.json"]
  # A file that a crash truncated is written again.
  for content in (b'{"batch', b'{"objectives": "\xff"}', b"\0" * 9):
    (model / "config.json").write_bytes(content)
    lock(model)


def test_no_local_folder_is_created_for_a_bucket(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match="can't be written to s3://"):
    lock("s3://bucket/run")
  assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------
# Files that a session could not upload. A folder stands for the bucket, whose
# emulator takes seconds to start.


def write_record(folder, *hosts):
  sessions = [{"started": "now", "host": host} for host in hosts]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "run.json").write_text(json.dumps({"sessions": sessions}))


@pytest.fixture
def run(tmp_path):
  """A run's folder of two sessions; the last one uploaded nothing."""
  run = workdir.RunFolder(tmp_path / "bucket", tmp_path / "0" / "run", True)
  write_record(run.path, "a", "b")
  (run.path / "log").write_text("b")
  record = run.path.with_name(workdir._NOT_UPLOADED)
  record.write_text(json.dumps(["log", "run.json", "removed"]))
  return run


def read_hosts(folder):
  return [s["host"] for s in sessions.read_sessions(folder)]


def list_apart(run):
  """The files that were moved to a folder of their own."""
  return [f.name for f in run.path.parent.glob("run.*/*")]


@pytest.mark.parametrize("there", [["a"], ["a", "b"], []])
def test_remaining_files_are_uploaded(run, caplog, there):
  write_record(run.url, *there)
  if not there:  # Only checkpoints.
    (run.url / "run.json").rename(run.url / "checkpoint")
  run.upload_remaining()
  assert (run.url / "log").read_text() == "b"
  assert read_hosts(run.url) == ["a", "b"] and not list_apart(run)
  assert f"no longer in {run.path} either: removed." in caplog.text
  run.path.joinpath("log").write_text("c")
  run.upload_remaining()  # Nothing remains.
  assert (run.url / "log").read_text() == "b"


@pytest.mark.parametrize("deleted", [True, False])
def test_remaining_files_replace_no_newer_run(run, caplog, deleted):
  if not deleted:
    write_record(run.url, "a", "c")
  run.upload_remaining()
  assert not (run.url / "log").exists()
  assert sorted(list_apart(run)) == ["log", "run.json"]
  reason = "was deleted" if deleted else "was trained on another machine"
  assert f"{run.url} {reason} since a session here" in caplog.text
  assert deleted or read_hosts(run.url) == ["a", "c"]


def test_remaining_files_wait_for_a_bucket_that_can_not_be_read(
  run, monkeypatch
):
  write_record(run.url, "a", "c")
  read_bytes = path.read_bytes

  def read(file):
    if file == run.url / "run.json":
      raise StorageError("503")
    return read_bytes(file)

  monkeypatch.setattr(path, "read_bytes", read)
  with pytest.raises(StorageError, match="503"):
    run.upload_remaining()
  monkeypatch.undo()
  assert read_hosts(run.url) == ["a", "c"]
  run.upload_remaining()
  assert sorted(list_apart(run)) == ["log", "run.json"]


@pytest.mark.slow
def test_remaining_files_replace_no_newer_run_in_a_bucket(
  gs, tmp_path, monkeypatch
):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path))
  url = f"{gs}/newer/run"
  write_record(tmp_path / "a", "a")
  write_record(tmp_path / "c", "a", "c")
  path.upload_folder(tmp_path / "a", path.as_path(url))
  with (
    refused(gs, "^newer"),
    pytest.raises(workdir.UploadError, match=r"the run: log, run\.json\."),
    workdir.open_run_folder(url) as run,
  ):
    write_record(run.path, "a", "b")
    (run.path / "log").touch()
  path.upload_folder(tmp_path / "c", path.as_path(url))
  with workdir.open_run_folder(url) as run:
    assert read_hosts(run.path) == ["a", "c"]
  assert not path.is_file(f"{url}/log") and "log" in list_apart(run)


def test_another_process_warns_of_remaining_files(run, monkeypatch, caplog):
  monkeypatch.setattr(workdir, "local_folder", lambda url: run.path)
  workdir._warn_of_remaining("gs://bucket/run")
  assert "gs://bucket/run may lack 3 files" in caplog.text
  assert f"They are in {run.path}." in caplog.text


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
  flags = [f"--config.data.train={entry}", "--config.checkpoint.keep=2"]
  return [*flags, trainings.NO_EVALS]


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
  # A store that also fails now and then, for writes as well.
  with (
    emulators.fail_requests("500", "429", "short", "slow", path="runs/killed"),
    emulators.fail_requests("503", "short", "500", path="alt=media"),
  ):
    process = launch(tmp_path, url, *arguments(remote))
    trainings.finish(process, tmp_path / "run")
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
  (line,) = trainings.problems(tmp_path / "run")
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
def test_the_error_of_a_run_comes_before_that_of_its_upload(
  gs, tmp_path, monkeypatch, caplog
):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path))
  with (
    refused(gs, "^runs/failed"),
    pytest.raises(ValueError, match="bad data"),
    workdir.open_run_folder(f"{gs}/runs/failed") as run,
  ):
    (run.path / "a").touch()
    raise ValueError("bad data")
  assert "lacks files of the run: a." in caplog.text
