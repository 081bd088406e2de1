"""Trackers: destinations of a run's metrics.

`config.log.trackers` names them, optionally with options:

  config.log.trackers = ("jsonl", "tensorboard", "wandb(project='mtv')")

A tracker is a class here and a line in `TRACKERS`; its fields are its options.
`MetricWriter` opens it on process 0 and tolerates its errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import json
import logging
import math
import os
import pathlib
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

from mtv_jax.config.op_strings import build_op, parse_ops
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError

log = logging.getLogger(__name__)

_IDS = "trackers.json"
_counter = itertools.count()
# Maximum rows to buffer while a file can't be written; drops the oldest.
MAX_PENDING = 100_000

RowPredicate = Callable[[Mapping[str, Any]], bool]


class JsonlFile:
  """A JSON-lines file that stays intact on full disks and after kills.

  Rows are JSON objects with a step. A row is on disk when `append` returns. If
  it raises, the row is buffered and written by the next `append` that succeeds.
  """

  def __init__(
    self,
    path: pathlib.Path,
    *,
    start_step: int = 0,
    keep_row: RowPredicate = lambda row: False,
  ):
    """Drops rows after `start_step` unless `keep_row`; 0 drops all rows."""
    self.path = path
    _drop_rows(path, start_step, keep_row)
    self._pending: list[bytes] = []

  def append(self, row: Mapping[str, Any]) -> None:
    self._pending.append(json.dumps(row).encode() + b"\n")
    del self._pending[:-MAX_PENDING]
    # Opened each time: mounted buckets store a file only when it is closed, and
    # writes to a deleted file would succeed silently.
    fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
      end = _truncate_incomplete_row(fd)
      try:
        # All or nothing, to avoid duplicate rows.
        data = memoryview(b"".join(self._pending))
        while data:
          data = data[os.write(fd, data) :]
        os.fsync(fd)
      except OSError:
        os.ftruncate(fd, end)
        raise
    finally:
      os.close(fd)
    self._pending.clear()


def _truncate_incomplete_row(fd: int) -> int:
  """Truncates an incomplete last line; returns the file's size."""
  size = end = os.fstat(fd).st_size
  while end and os.pread(fd, 1, end - 1) != b"\n":
    end -= 1
  if end < size:
    os.ftruncate(fd, end)
  return end


def _drop_rows(path: pathlib.Path, step: int, keep_row: RowPredicate) -> None:
  """Drops rows after a step, and a last line truncated by a crash."""
  if not path.exists():
    return
  text = path.read_text(encoding="utf-8", errors="replace")
  lines = text.splitlines() if step else []
  new = "".join(
    f"{line}\n"
    for line, row in zip(lines, map(_parse_row, lines), strict=True)
    if row and (row["step"] <= step or keep_row(row))
  )
  if new != text:
    atomic.write(path, new.encode())


def _parse_row(line: str) -> dict[str, Any] | None:
  """Parses a row with a step; None if invalid."""
  try:
    row = json.loads(line)
    return {**row, "step": float(row["step"])}
  except (ValueError, KeyError, TypeError):
    return None


@dataclasses.dataclass(frozen=True)
class TrackedRun:
  """The run that a tracker logs; it resumes from `start_step`.

  Later steps that an earlier session logged are repeated with equal metrics: a
  tracker drops their old rows or does not write them again.
  """

  folder: pathlib.Path
  name: str
  start_step: int = 0  # 0 for a new run.
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def read_id(self, tracker: str) -> str | None:
    """The tracker's identifier of the run; None for a new run."""
    return self._read_ids().get(tracker) if self.start_step else None

  def write_id(self, tracker: str, value: str) -> None:
    """Stores the tracker's identifier for resumed sessions."""
    ids = self._read_ids() | {tracker: value}
    path = self.folder / _IDS
    atomic.write(path, json.dumps(ids, indent=1).encode() + b"\n")

  def _read_ids(self) -> dict[str, str]:
    ids = path_lib.read_json(self.folder / _IDS, tolerant=True)
    return ids if isinstance(ids, dict) else {}


@dataclasses.dataclass
class Tracker:
  """Base class of trackers, which write scalars."""

  # Required package, and the command that installs it.
  package: ClassVar[str | None] = None
  install: ClassVar[str] = "pip install 'mtv_jax[trackers]'"
  # File trackers retry after every file system error. Service trackers are
  # disabled after several consecutive errors of any kind.
  is_file: ClassVar[bool] = False

  def open(self, run: TrackedRun) -> None:
    """Starts or continues the run."""
    raise NotImplementedError

  def write_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    """Writes a step's metrics durably: they survive a kill of the process."""
    raise NotImplementedError

  def close(self, *, failed: bool = False) -> None:
    """Ends this session of the run."""


@dataclasses.dataclass
class Jsonl(Tracker):
  """metrics.jsonl: one row per measurement; non-finite values are null."""

  is_file = True

  def open(self, run: TrackedRun) -> None:
    self._file = JsonlFile(
      run.folder / "metrics.jsonl", start_step=run.start_step
    )

  def write_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    # NaN is not valid JSON.
    row = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    self._file.append({"step": step, **row})


def _import_tensorboardx() -> ModuleType:
  """Imports tensorboardX without optional packages that take 8 s to import."""
  hidden = {"torch", "boto3", "google.cloud.storage"} - sys.modules.keys()
  # Importing a module that is None raises ImportError.
  sys.modules |= dict.fromkeys(hidden)
  try:
    return importlib.import_module("tensorboardX")
  finally:
    for name in hidden:
      del sys.modules[name]


@dataclasses.dataclass
class TensorBoard(Tracker):
  """Event files in the run's folder; omits non-finite values.

  Does not use tensorboardX's `SummaryWriter`: its thread dies at the first
  error, and the next call blocks forever. Starts a new file after an error or
  if the file was deleted, since readers stop at a truncated record.
  """

  is_file = True

  def open(self, run: TrackedRun) -> None:
    self._library = _import_tensorboardx()
    self._folder = run.folder
    # TensorBoard hides an earlier session's values from this step on.
    self._purge_step = run.start_step + 1 if run.start_step else 0
    self._records = None
    self._start_file()

  def write_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    if self._records is None or not os.path.exists(self._records.path):
      self._discard()
      self._start_file()
    summary = self._library.summary
    values = [
      value
      for name, number in numbers.items()
      if math.isfinite(number)
      for value in summary.scalar(name, number).value
    ]
    self._write(step=step, summary=summary.Summary(value=values))

  def _start_file(self) -> None:
    parts = (int(time.time()), socket.gethostname(), os.getpid())
    name = ".".join(map(str, ("events.out.tfevents", *parts, next(_counter))))
    path = self._folder / name
    try:
      self._records = self._library.record_writer.RecordWriter(str(path))
      self._write(file_version="brain.Event:2")
      if self._purge_step is not None:
        session = self._library.proto.event_pb2.SessionLog
        start = session(status=session.START)
        self._write(step=self._purge_step, session_log=start)
        self._purge_step = None
    except OSError:
      path.unlink(missing_ok=True)
      raise

  def _write(self, **fields: Any) -> None:
    event = self._library.proto.event_pb2.Event
    event = event(wall_time=time.time(), **fields)
    try:
      self._records.write(event.SerializeToString())
      self._records.flush()
    except OSError:
      self._discard()
      raise

  def _discard(self) -> None:
    records, self._records = self._records, None
    if records is not None:
      with contextlib.suppress(OSError):
        records.close()

  def close(self, *, failed: bool = False) -> None:
    self._discard()


@dataclasses.dataclass
class Wandb(Tracker):
  """Weights & Biases. A resumed run continues its W&B run.

  W&B keeps the first values of a step, so repeated steps are not sent. Login
  and mode follow the package: WANDB_API_KEY, WANDB_MODE=offline.
  """

  project: str = "mtv_jax"
  entity: str | None = None
  name: str | None = None  # The folder's name by default.
  group: str | None = None
  tags: tuple[str, ...] = ()

  package = "wandb"

  def open(self, run: TrackedRun) -> None:
    import wandb

    self._run = wandb.init(
      project=self.project,
      entity=self.entity,
      name=self.name or run.name,
      group=self.group,
      tags=self.tags or None,
      id=run.read_id("wandb"),
      resume="allow",
      dir=str(run.folder),
      config=dict(run.config),
      # Prevents W&B from capturing the console log.
      settings=wandb.Settings(console="off"),
    )
    run.write_id("wandb", self._run.id)
    # The server's step count; 0 for a new run or offline.
    self._first_step = self._run.starting_step

  def write_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    if step >= self._first_step:
      self._run.log(dict(numbers), step=step)

  def close(self, *, failed: bool = False) -> None:
    self._run.finish(exit_code=int(failed))


@dataclasses.dataclass
class MLflow(Tracker):
  """MLflow. A resumed run continues its MLflow run.

  MLflow stores every value of a step, so steps before the last logged one are
  not sent again. Writes to MLFLOW_TRACKING_URI, by default the subfolder
  `mlruns` of the run's folder.
  """

  experiment: str = "mtv_jax"
  name: str | None = None  # The folder's name by default.
  uri: str | None = None

  package = "mlflow"

  def __post_init__(self):
    if self.uri is not None and re.match("[^/]*//[^/]*@", self.uri):
      raise ConfigError(
        "mlflow's uri has a user or a password, which config.json would store:"
        " set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead."
      )

  def open(self, run: TrackedRun) -> None:
    # An unresponsive server delays training by seconds, not minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # Allows the local file store, which does not need SQLAlchemy.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient, entities, exceptions

    self._entities = entities
    local = (run.folder / "mlruns").absolute().as_uri()
    uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or local
    self._client = MlflowClient(tracking_uri=uri)
    self._id, self._first_step = run.read_id("mlflow"), 0
    if self._id is not None:
      try:
        self._client.update_run(self._id, status="RUNNING")
        losses = self._client.get_metric_history(self._id, "loss")
        self._first_step = max((value.step for value in losses), default=0)
        return
      except exceptions.MlflowException as error:
        log.warning(f"MLflow lacks the run {self._id}; starting one: {error}")
    experiment = self._client.get_experiment_by_name(self.experiment)
    experiment_id = experiment and experiment.experiment_id
    if experiment is None:
      experiment_id = self._client.create_experiment(self.experiment)
    name = self.name or run.name
    self._id = self._client.create_run(experiment_id, run_name=name).info.run_id
    params = [
      entities.Param(key, str(value)[:500])
      for key, value in _flatten(run.config)
    ]
    for i in range(0, len(params), 100):  # The limit of a request.
      self._client.log_batch(self._id, params=params[i : i + 100])
    run.write_id("mlflow", self._id)

  def write_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    if step < self._first_step:
      return
    now = int(1000 * time.time())
    metrics = [
      self._entities.Metric(name, value, now, step)
      for name, value in numbers.items()
      if math.isfinite(value)
    ]
    self._client.log_batch(self._id, metrics=metrics)

  def close(self, *, failed: bool = False) -> None:
    status = "FAILED" if failed else "FINISHED"
    self._client.set_terminated(self._id, status=status)


@dataclasses.dataclass
class Trackio(Tracker):
  """Trackio, a local dashboard: `trackio show --project=mtv_jax`.

  Trackio resumes by name, so a run's name ends in random characters. Repeated
  steps of a resumed run appear twice, with the same values. A thread writes the
  values every half second. `space_id` sends them to a Hugging Face Space.
  """

  project: str = "mtv_jax"
  name: str | None = None  # The folder's name and random characters by default.
  group: str | None = None
  space_id: str | None = None

  package = "trackio"

  def open(self, run: TrackedRun) -> None:
    import trackio

    run_id = run.read_id("trackio")
    name = run_id or self.name or f"{run.name}-{os.urandom(3).hex()}"
    self._run = trackio.init(
      project=self.project,
      name=name,
      group=self.group,
      space_id=self.space_id,
      resume="allow" if run_id else "never",
      config=dict(run.config),
      embed=False,  # Not shown in notebooks.
    )
    run.write_id("trackio", name)

  def write_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    self._run.log(dict(numbers), step=step)

  def close(self, *, failed: bool = False) -> None:
    self._run.finish()


@dataclasses.dataclass
class Clu(Tracker):
  """`clu.metric_writers`: TensorFlow's event files, in the folder `clu`.

  TensorBoard shows the repeated steps of a resumed run twice.
  """

  package = "tensorflow"
  install = "pip install tensorflow tensorboard"

  def open(self, run: TrackedRun) -> None:
    from clu import metric_writers

    self._writer = metric_writers.SummaryWriter(str(run.folder / "clu"))

  def write_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    self._writer.write_scalars(step, numbers)
    self._writer.flush()

  def close(self, *, failed: bool = False) -> None:
    self._writer.close()


TRACKERS: dict[str, type[Tracker]] = {
  "jsonl": Jsonl,
  "tensorboard": TensorBoard,
  "wandb": Wandb,
  "mlflow": MLflow,
  "trackio": Trackio,
  "clu": Clu,
}


def build_trackers(names: str | Sequence[str]) -> dict[str, Tracker]:
  """Builds the trackers of `config.log.trackers`, not opened yet.

  Names are op strings: "jsonl", "wandb(project='mtv')", "jsonl|tensorboard".
  """
  text = names if isinstance(names, str) else "|".join(names)
  trackers = {}
  try:
    for op in parse_ops(text, unique=True):
      trackers[op.name] = build_op(op, TRACKERS, "tracker")
  except ConfigError as error:
    message = re.sub(r"//[^/\s]*@", "//...@", str(error))  # No passwords.
    raise ConfigError(f"config.log.trackers: {message}") from None
  for name, tracker in trackers.items():
    package = tracker.package
    if package and importlib.util.find_spec(package) is None:
      raise ConfigError(
        f"config.log.trackers: {name} needs the package {package}, which is not"
        f" installed: {tracker.install}."
      )
  return trackers


def _flatten(config: Any, path: str = "") -> list[tuple[str, Any]]:
  """Dotted keys and values of nested dictionaries."""
  if not isinstance(config, Mapping):
    return [(path, config)]
  return [
    pair
    for key, value in config.items()
    for pair in _flatten(value, f"{path}.{key}" if path else str(key))
  ]
