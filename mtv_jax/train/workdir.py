"""A run's folder: its lock, its recorded config, and its copy in a bucket.

A run in a bucket (`gs://`) writes its checkpoints there directly. Other files
are written to a local folder and uploaded from there, since bucket objects
can't be appended to. At startup, the bucket's files replace the local ones.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import filelock

from mtv_jax.train.runtime.sessions import (
  ALIVE_SECONDS,
  read_alive,
  read_sessions,
  seconds_since,
)
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError, StorageError, printable

log = logging.getLogger(__name__)

LOCK, OWNER = ".lock", ".lock.owner"
CHECKPOINTS = "checkpoints"
# Written if a bound ends the run: step, reason and config.
END = "end.json"
UPLOAD_SECONDS = 30.0
# Maximum interval between liveness updates of a run in a bucket.
WATCH_SECONDS = ALIVE_SECONDS + UPLOAD_SECONDS + 15.0
# Next to the local folder of a run in a bucket: lists files not yet uploaded.
_NOT_UPLOADED = "not_uploaded.json"
# Not downloaded: written to the bucket by Orbax or JAX, or not read on resume.
_NOT_STAGED = (CHECKPOINTS, "compiled", "events.out.*", "profile")


class LockedError(ConfigError):
  """Raised if another process trains in the folder."""

  exit_code = 1  # A restart may find it unlocked.


class UploadError(StorageError):
  """Raised if a run's files could not be uploaded to its bucket."""


@contextlib.contextmanager
def lock_workdir(folder: str | os.PathLike) -> Iterator[None]:
  """Locks a run's folder, created if missing; raises LockedError if locked.

  Two runs would delete each other's unfinished checkpoints. One process locks
  the folder for all, until it exits. Does nothing on file systems without
  locks. In a bucket, `check_other_hosts` detects runs of other machines.
  """
  check_workdir(folder)
  read_recorded_config(folder)
  if path_lib.is_remote(folder):
    path = _staging_folder(folder)
    check_other_hosts(folder)
  else:
    path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  owner = path / OWNER
  lock = filelock.FileLock(path / LOCK, timeout=0, fallback_to_soft=False)
  try:
    lock.acquire()
  except filelock.Timeout:
    holder = owner.read_text() if owner.exists() else "another process"
    raise LockedError(
      f"--workdir={folder} is locked by {holder}. Wait, or use another folder."
    ) from None
  except (NotImplementedError, OSError):
    yield
    return
  try:
    with contextlib.suppress(OSError):  # A full disk.
      owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    yield
  finally:
    lock.release()


def check_other_hosts(
  workdir: str | os.PathLike, *, seconds: float | int = WATCH_SECONDS
) -> None:
  """Raises LockedError if a process of another machine trains in a folder.

  Such a process rewrites the liveness file within `seconds`, unless it compiles
  or evaluates for longer. Does not wait if the file is over an hour old or
  records its process's exit.
  """
  alive = read_alive(workdir)
  if (
    alive is None
    or alive.get("activity") == "exit"
    or alive.get("host") == socket.gethostname()
    or seconds_since(alive) > 3600
  ):
    return
  process = f"process {alive.get('process')} on {alive.get('host')}"
  log.info(
    f"{workdir} was trained by {process} until {alive.get('time')} and did not"
    f" record its exit. Waiting up to {seconds:g} s to see if it still trains."
  )
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    time.sleep(min(seconds / 10, 5.0))
    if read_alive(workdir) != alive:
      raise LockedError(
        f"--workdir={workdir} is trained by {process}. Wait, or choose another"
        " folder."
      )


def check_workdir(folder: str | os.PathLike) -> None:
  """Raises ConfigError if a run can't be written to a folder.

  Examples: a file, a read-only folder, a bucket other than `gs://`.
  """
  if not str(folder):
    raise ConfigError("--workdir is empty; a folder is expected.")
  if not path_lib.is_remote(folder):
    path = pathlib.Path(folder).absolute()
    candidates = (p for p in (path, *path.parents) if os.path.lexists(p))
    if not (existing := next(candidates)).is_dir():
      raise ConfigError(
        f"--workdir={folder}: {existing} is a file; a folder is expected."
      )
    if not os.access(existing, os.W_OK | os.X_OK):
      raise ConfigError(f"--workdir={folder}: {existing} can't be written to.")
  elif not str(folder).startswith("gs://"):
    raise ConfigError(
      f"--workdir={folder}: checkpoints can't be written to "
      f"{str(folder).partition('//')[0]}//. Use a folder or gs://, and copy "
      "the run when it is complete."
    )


def read_recorded_config(folder: str | os.PathLike) -> dict[str, Any]:
  """Reads the resolved config of the run in a folder.

  Empty if the file is missing or truncated by a crash; training rewrites it.
  """
  content = path_lib.read_json(path_lib.as_path(folder) / "config.json")
  if content is None:
    return {}
  if not isinstance(content, dict) or "objectives" not in content:
    raise ConfigError(
      f"--workdir={folder} contains a config.json that is not a run's (an"
      " exported model?) and would be replaced. Choose another folder."
    )
  return content


@dataclasses.dataclass
class RunFolder:
  """The local folder of a run's files, and their upload to a bucket."""

  url: str | os.PathLike  # The `workdir` as the user wrote it.
  path: pathlib.Path  # Equals `url` unless that is a bucket.
  uploads: bool = False  # Whether this process uploads to a bucket.

  def __post_init__(self):
    self._lock = threading.Lock()
    self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}

  def list_files(self) -> dict[pathlib.Path, tuple[int, int]]:
    files = {}
    for file in self.path.rglob("*"):
      with contextlib.suppress(FileNotFoundError):  # Replaced meanwhile.
        if file.is_file() and not atomic.is_temporary(file):
          state = file.stat()
          files[file] = state.st_mtime_ns, state.st_size
    return files

  def upload(self) -> None:
    """Uploads changed files. Logs errors; the next upload retries."""
    try:
      self.upload_changed()
    except OSError as error:
      log.warning("%s can't be uploaded: %s", self.url, error)

  def upload_changed(self) -> None:
    """Uploads changed files, if this process uploads."""
    if not self.uploads:
      return
    with self._lock:
      for file, state in self._list_changed().items():
        # Read in one call, since rows may be appended meanwhile.
        self._upload_file(str(file.relative_to(self.path)))
        self._uploaded[file] = state

  def upload_last(self) -> None:
    """Uploads changed files at exit; raises UploadError if that fails."""
    try:
      self.upload_changed()
    except OSError as error:
      changed = self._list_changed()
      names = sorted(str(f.relative_to(self.path)) for f in changed)
      with contextlib.suppress(OSError):  # A full disk.
        atomic.write_text(self._not_uploaded_path, json.dumps(names))
      raise UploadError(
        f"{self.url} lacks files of the run: {printable(', '.join(names))}."
        f" {error}. They are in {self.path}. Rerun the command on this machine"
        " to upload them, or upload them with: gcloud storage cp"
        f" --recursive '{self.path}/*' {self.url}/"
      ) from error

  def upload_remaining(self) -> None:
    """Uploads files that the last session on this machine could not upload.

    If another machine has trained the run since, or the run was deleted from
    the bucket, moves the local files to a separate folder instead.
    """
    names = path_lib.read_json(self._not_uploaded_path, tolerant=True)
    if not isinstance(names, list) or not self.path.is_dir():
      return
    problem = self._find_change()
    if problem is None:
      missing = [n for n in names if not (self.path / n).is_file()]
      if missing:
        log.warning(
          f"{self.url} lacks files that are no longer in {self.path} either:"
          f" {printable(', '.join(missing))}."
        )
      for name in names:
        if name not in missing:
          self._upload_file(name)
      count = len(names) - len(missing)
      log.info("Uploaded %d files that %s lacked.", count, self.url)
    else:
      backup = self.path.with_name(f"{self.path.name}.{time.time_ns()}")
      self.path.rename(backup)
      log.warning(
        f"{self.url} {problem} since a session here failed to upload"
        f" {len(names)} files. They are in {backup}."
      )
    self._not_uploaded_path.unlink()

  def _find_change(self) -> str | None:
    """How the run changed since the last session here; None if unchanged."""
    local_starts = _list_starts(read_sessions(self.path))
    # Not tolerant: a bucket error would read as a run without sessions.
    remote_starts = _list_starts(read_sessions(self.url, tolerant=False))
    if not remote_starts <= local_starts:
      return "was trained on another machine"
    # The session may have written checkpoints but not run.json.
    if not remote_starts and not path_lib.list_folder(self.url):
      return "was deleted"
    return None

  @property
  def _not_uploaded_path(self) -> pathlib.Path:
    return self.path.with_name(_NOT_UPLOADED)

  def _list_changed(self) -> dict[pathlib.Path, tuple[int, int]]:
    files, uploaded = self.list_files(), self._uploaded
    return {f: state for f, state in files.items() if uploaded.get(f) != state}

  def _upload_file(self, name: str) -> None:
    data = (self.path / name).read_bytes()
    path_lib.write_bytes(path_lib.as_path(self.url) / name, data)


def _warn_of_remaining(workdir: str | os.PathLike) -> None:
  """Warns of files left by a session whose process 0 ran on this machine."""
  folder = local_folder(workdir)
  names = path_lib.read_json(folder.with_name(_NOT_UPLOADED), tolerant=True)
  if isinstance(names, list) and folder.is_dir():
    log.warning(
      f"{workdir} may lack {len(names)} files of a session that had process 0"
      f" on this machine. They are in {folder}. Start the run with process 0 on"
      " this machine to upload them."
    )


def _list_starts(sessions: Sequence[dict[str, Any]]) -> set[str]:
  return {f"{s.get('started')} {s.get('host')}" for s in sessions}


@contextlib.contextmanager
def open_run_folder(
  workdir: str | os.PathLike, *, process_index: int = 0
) -> Iterator[RunFolder]:
  """Yields the folder to write to, and uploads it if `workdir` is in a bucket.

  Process 0 uploads changed files every `UPLOAD_SECONDS` and on exit. All
  processes download the bucket's files.
  """
  if not path_lib.is_remote(workdir):
    yield RunFolder(workdir, pathlib.Path(workdir))
    return
  check_workdir(workdir)
  folder = local_folder(workdir, process_index=process_index)
  run_folder = RunFolder(workdir, folder, uploads=process_index == 0)
  if run_folder.uploads:
    run_folder.upload_remaining()
  else:
    _warn_of_remaining(workdir)
  shutil.rmtree(folder, ignore_errors=True)
  run_folder.path.mkdir(parents=True)
  path_lib.download_folder(workdir, folder, ignore=_NOT_STAGED)
  run_folder._uploaded = run_folder.list_files()
  exit_event = threading.Event()

  def upload_repeatedly() -> None:
    while not exit_event.wait(UPLOAD_SECONDS):
      run_folder.upload()

  thread = threading.Thread(target=upload_repeatedly, daemon=True)
  thread.start()
  has_failed = True
  try:
    yield run_folder
    has_failed = False
  finally:
    exit_event.set()
    thread.join()
    try:
      run_folder.upload_last()
    except UploadError as error:
      if not has_failed:
        raise
      log.error("%s", error)


def local_folder(
  workdir: str | os.PathLike, *, process_index: int = 0
) -> pathlib.Path:
  """The local folder to which a process writes a run's files."""
  if not path_lib.is_remote(workdir):
    return pathlib.Path(workdir)
  name = path_lib.as_path(workdir).name
  return _staging_folder(workdir) / f"{process_index}" / name


def copy_run(workdir: str | os.PathLike, folder: pathlib.Path) -> pathlib.Path:
  """Copies a bucket's files, except checkpoints; returns the local folder."""
  if not path_lib.is_remote(workdir):
    return pathlib.Path(workdir)
  target = folder / path_lib.as_path(workdir).name
  target.mkdir(parents=True)
  path_lib.download_folder(workdir, target, ignore=_NOT_STAGED)
  return target


def _staging_folder(workdir: str | os.PathLike) -> pathlib.Path:
  url = os.fspath(workdir).rstrip("/")
  digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
  return path_lib.cache_folder() / "runs" / digest
