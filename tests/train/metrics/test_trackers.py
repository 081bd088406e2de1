"""Trackers: W&B offline and MLflow's file store with the real packages."""

import contextlib
import glob
import json
import logging
import os
import sqlite3
import struct

import pytest

from mtv_jax.train.metrics import MetricWriter, build_trackers, trackers
from mtv_jax.utils.errors import ConfigError, UserError


def write(folder, tracker, steps, *, start_step=0, failed=False):
  built = build_trackers(("jsonl", tracker))
  config = {"optim": {"lr": 0.5}, "data": {"train": [{"type": "scenes"}]}}
  writer = MetricWriter(
    folder, total_steps=10, start_step=start_step, trackers=built, config=config
  )
  for step in steps:
    writer.write_scalars(step, {"loss": 1.0 / step, "a/b": float("nan")})
    writer.write_scalars(step, {"knn/top1": step / 10})
  writer.close(failed=failed)


def read_ids(folder):
  return json.loads((folder / "trackers.json").read_text())


# --- the config --------------------------------------------------------------


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (("jsonl", "tensorbord"), "Did you mean 'tensorboard'?"),
    ("jsonl|jsonl", "repeat 'jsonl'"),
    (("wandb(projekt='a')",), "wandb.*projekt.*project"),
    (("wandb(project=3)",), "project is 3, expected a string"),
    (("jsonl(",), "can't read the ops"),
    (("mlflow(uri='http://me:SECRET@a.b')",), "set MLFLOW_TRACKING_USERNAME"),
    (("mlflow(uri='http://:SECRET@a.b')",), "has a user or a password"),
  ],
)
def test_errors_name_the_key(names, message):
  with pytest.raises(
    ConfigError, match=f"(?s)config.log.trackers: .*{message}"
  ) as caught:
    build_trackers(names)
  assert "SECRET" not in str(caught.value)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
  monkeypatch.setattr(trackers.Wandb, "package", "no_such_package")
  message = "wandb needs the package no_such_package.* pip install 'mtv_jax"
  with pytest.raises(ConfigError, match=message):
    build_trackers(("wandb",))


# --- errors ------------------------------------------------------------------


class Server(trackers.Tracker):
  """A server that is away for the steps of `away`."""

  def __init__(self, away=()):
    self.away, self.steps, self.closed = away, [], None

  def open(self, run):
    if run.start_step in self.away:
      raise ConnectionError("no route")

  def write_scalars(self, step, numbers):
    if step in self.away:
      raise RuntimeError("503")
    self.steps.append(step)

  def close(self, *, failed=False):
    self.closed = failed


def run_server(folder, server, *, start_step=0):
  with MetricWriter(
    folder, total_steps=20, start_step=start_step, trackers={"server": server}
  ) as writer:
    for step in range(start_step + 1, 21):
      writer.write_scalars(step, {"loss": 1.0})


def warnings(caplog):
  return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize(
  ("end", "steps", "closed", "message"),
  [
    (7, [1, 2, *range(7, 21)], False, "Metrics are written to server again."),
    (100, [1, 2], None, "server is disabled until the run is resumed, after 5"),
  ],
)
def test_a_server_may_be_away_for_a_while(
  tmp_path, caplog, end, steps, closed, message
):
  server = Server(away=range(3, end))
  run_server(tmp_path, server)
  assert server.steps == steps and server.closed is closed
  first, last = warnings(caplog)
  assert first.endswith("to server; training continues. RuntimeError: 503")
  assert last.startswith(message)


def test_a_server_must_be_there_at_the_start_but_not_at_a_resume(
  tmp_path, caplog
):
  with pytest.raises(UserError, match="server can't start a run.*no route"):
    run_server(tmp_path, Server(away=[0]))
  server = Server(away=[4])
  run_server(tmp_path, server, start_step=4)
  assert not server.steps
  assert "server can't continue the run" in warnings(caplog)[-1]


def test_a_defect_of_a_file_tracker_is_raised(tmp_path, monkeypatch):
  def fail(*_):
    raise TypeError("a defect")

  monkeypatch.setattr(trackers.Jsonl, "write_scalars", fail)
  with (
    MetricWriter(tmp_path, total_steps=1) as writer,
    pytest.raises(TypeError, match="a defect"),
  ):
    writer.write_scalars(1, {"loss": 1.0})


# --- the packages ------------------------------------------------------------


def read_wandb(path):
  """The records of an offline run, in the format of LevelDB's logs."""
  data = path.read_bytes()
  offset, parts = 7, []
  while offset + 7 <= len(data):
    if (left := 32768 - offset % 32768) < 7:  # A record's header.
      offset += left
      continue
    size, kind = struct.unpack("<HB", data[offset + 4 : offset + 7])
    parts.append(data[offset + 7 : offset + 7 + size])
    offset += 7 + size
    if kind in (1, 4):  # Whole, or the last part.
      yield b"".join(parts)
      parts = []


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_continues_a_run(tmp_path, monkeypatch):
  wandb = pytest.importorskip("wandb", reason="wandb is not installed")
  from wandb.proto import wandb_internal_pb2

  for name, value in {"MODE": "offline", "SILENT": "true"}.items():
    monkeypatch.setenv(f"WANDB_{name}", value)
  folder = tmp_path / "a_run"
  write(folder, "wandb(project='mtv', tags=('a', 'b'))", range(1, 6))
  first = read_ids(folder)["wandb"]
  write(folder, "wandb(project='mtv')", range(4, 8), start_step=3)
  assert read_ids(folder)["wandb"] == first
  wandb.teardown()  # Its process writes the files when it ends.
  sessions = []
  for path in folder.glob("wandb/offline-run-*/*.wandb"):
    rows = {}
    for data in read_wandb(path):
      record = wandb_internal_pb2.Record.FromString(data)
      if record.HasField("run"):
        assert record.run.run_id == first
        assert record.run.project == "mtv"
        assert record.run.display_name == "a_run"
      if record.HasField("history"):
        row = {
          item.key or "/".join(item.nested_key): json.loads(item.value_json)
          for item in record.history.item
        }
        rows[row["_step"]] = row
    sessions.append(rows)
  sessions.sort(key=min)
  assert [[*rows] for rows in sessions] == [[*range(1, 6)], [*range(4, 8)]]
  assert sessions[0][4]["loss"] == 0.25 and sessions[0][4]["knn/top1"] == 0.4


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_continues_a_run(tmp_path, monkeypatch):
  mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
  monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
  # Set by the tracker, and unset afterwards.
  for name in ("REQUEST_TIMEOUT", "REQUEST_MAX_RETRIES"):
    monkeypatch.setenv(f"MLFLOW_HTTP_{name}", "1")
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  folder = tmp_path / "a_run"
  write(folder, "mlflow(experiment='mtv')", range(1, 6), failed=True)
  first = read_ids(folder)["mlflow"]
  client = mlflow.MlflowClient((folder / "mlruns").as_uri())
  assert client.get_run(first).info.status == "FAILED"
  write(folder, "mlflow(experiment='mtv')", range(4, 8), start_step=3)
  assert read_ids(folder)["mlflow"] == first
  run = client.get_run(first)
  assert run.info.run_name == "a_run" and run.info.status == "FINISHED"
  assert run.data.params["optim.lr"] == "0.5"
  points = [(m.step, m.value) for m in client.get_metric_history(first, "loss")]
  # The last step may be incomplete, and is sent again.
  assert sorted(points) == [(s, 1 / s) for s in (1, 2, 3, 4, 5, 5, 6, 7)]
  # A new run in the folder is a new one there.
  write(folder, "mlflow(experiment='mtv')", range(1, 3))
  assert read_ids(folder)["mlflow"] != first
  # One that was deleted is started again.
  client.delete_run(read_ids(folder)["mlflow"])
  write(folder, "mlflow(experiment='mtv')", range(2, 4), start_step=1)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_survives_a_server_that_is_away(tmp_path, monkeypatch, caplog):
  pytest.importorskip("mlflow", reason="mlflow is not installed")
  for name in ("REQUEST_TIMEOUT", "REQUEST_MAX_RETRIES"):
    monkeypatch.setenv(f"MLFLOW_HTTP_{name}", "1")
  (tmp_path / "trackers.json").write_text('{"mlflow": "abc"}')
  with caplog.at_level(logging.WARNING):
    write(tmp_path, "mlflow(uri='http://127.0.0.1:9')", [2], start_step=1)
  assert any("mlflow" in m for m in warnings(caplog))
  assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.reference
def test_trackio_continues_a_run(tmp_path, monkeypatch):
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
  pytest.importorskip("trackio", reason="trackio is not installed")
  folder = tmp_path / "a_run"
  write(folder, "trackio(project='mtv')", range(1, 6))
  first = read_ids(folder)["trackio"]
  write(folder, "trackio(project='mtv')", range(4, 8), start_step=3)
  assert read_ids(folder)["trackio"] == first and first.startswith("a_run-")
  (path,) = (tmp_path / "trackio").glob("mtv*.db")
  with contextlib.closing(sqlite3.connect(path)) as database:
    rows = database.execute("SELECT run_name, step, metrics FROM metrics")
    rows = [(name, step, json.loads(text)) for name, step, text in rows]
  assert {name for name, *_ in rows} == {first}
  points = [(step, row["loss"]) for _, step, row in rows if "loss" in row]
  assert sorted(points) == [(s, 1 / s) for s in (1, 2, 3, 4, 4, 5, 5, 6, 7)]


@pytest.mark.reference
def test_clu_writes_event_files(tmp_path):
  pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
  write(tmp_path, "clu", range(1, 3))
  (path,) = glob.glob(f"{tmp_path}/clu/events*")
  assert os.path.getsize(path) > 100
