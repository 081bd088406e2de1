"""The lock on a run's folder."""

import datetime
import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from mtv_jax.train import workdir
from mtv_jax.train.runtime import sessions
from mtv_jax.utils import atomic, path
from mtv_jax.utils.errors import ConfigError, StorageError


def test_a_folder_is_created_and_released(tmp_path):
  folder = tmp_path / "runs" / "ü a"
  for _ in range(2):
    with workdir.lock_workdir(folder):
      assert "process" in (folder / workdir.OWNER).read_text()


def test_an_error_inside_is_raised_and_releases_the_lock(tmp_path):
  with pytest.raises(OSError, match="full"), workdir.lock_workdir(tmp_path):
    raise OSError("full")
  with workdir.lock_workdir(tmp_path):
    pass


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
  with (
    pytest.raises(workdir.LockedError, match=match) as error,
    workdir.lock_workdir(tmp_path),
  ):
    pass
  assert error.value.exit_code == 1  # A supervisor tries again.
  # As after a crash.
  other.kill()
  other.communicate()
  with workdir.lock_workdir(tmp_path):
    pass


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_run_of_another_host_is_known_by_its_liveness_file(tmp_path, goes_on):
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  alive = {"activity": "train", "time": now, "host": "other", "process": 7}

  def write(**changes):
    atomic.write(tmp_path / "alive", json.dumps(alive | changes).encode())

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
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  alive = {"activity": "train", "time": now, "host": "other"} | changes
  (tmp_path / "alive").write_text(json.dumps(alive))
  start = time.monotonic()
  workdir.check_other_hosts(tmp_path, seconds=60)
  assert time.monotonic() - start < 5


def test_folders_of_other_content_are_rejected(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ConfigError, match="file is a file; a folder"):  # noqa: SIM117
    with workdir.lock_workdir(tmp_path / "file"):
      pass
  model = tmp_path / "model"
  model.mkdir()
  text = json.dumps({"model_type": "siglip"})
  (model / "config.json").write_text(text)
  with (
    pytest.raises(ConfigError, match="that is not a run's"),
    workdir.lock_workdir(model),
  ):
    pass
  assert [p.name for p in model.iterdir()] == ["config.json"]
  # A file that a crash truncated is written again.
  (model / "config.json").write_text('{"batch')
  with workdir.lock_workdir(model):
    pass


def test_no_local_folder_is_created_for_a_bucket(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with (
    pytest.raises(ConfigError, match="can't be written to s3://"),
    workdir.lock_workdir("s3://bucket/run"),
  ):
    pass
  assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------
# Files that a session could not upload. A folder stands for the bucket, whose
# emulator takes seconds to start: see test_buckets.py.


def write_record(folder, *hosts):
  sessions = [{"started": "now", "host": host} for host in hosts]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "run.json").write_text(json.dumps({"sessions": sessions}))


@pytest.fixture
def run(tmp_path):
  """A run's folder of two sessions; the last one uploaded nothing."""
  run = workdir.RunFolder(tmp_path / "bucket", tmp_path / "0" / "run", True)
  write_record(run.folder, "a", "b")
  (run.folder / "log").write_text("b")
  record = run.folder.with_name(workdir._NOT_UPLOADED)
  record.write_text(json.dumps(["log", "run.json", "removed"]))
  return run


def read_hosts(folder):
  return [s["host"] for s in sessions.read_sessions(folder)]


def list_apart(run):
  """The files that were moved to a folder of their own."""
  return [f.name for f in run.folder.parent.glob("run.*/*")]


@pytest.mark.parametrize("there", [["a"], ["a", "b"], []])
def test_remaining_files_are_uploaded(run, caplog, there):
  write_record(run.url, *there)
  if not there:  # Only checkpoints.
    (run.url / "run.json").rename(run.url / "checkpoint")
  run.upload_remaining()
  assert (run.url / "log").read_text() == "b"
  assert read_hosts(run.url) == ["a", "b"] and not list_apart(run)
  assert f"no longer in {run.folder} either: removed." in caplog.text
  run.folder.joinpath("log").write_text("c")
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


def test_another_process_warns_of_remaining_files(run, monkeypatch, caplog):
  monkeypatch.setattr(workdir, "local_folder", lambda url: run.folder)
  workdir._warn_of_remaining("gs://bucket/run")
  assert "gs://bucket/run may lack 3 files" in caplog.text
  assert f"They are in {run.folder}." in caplog.text
