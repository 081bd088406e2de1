"""Taking a run's folder: it must be a run's, or new, and nobody else's now."""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import IO

from mtv_jax.utils.errors import ConfigError

try:
  import fcntl
except ImportError:  # Windows: without it nothing is held.
  fcntl = None

LOCK = ".lock"


@contextlib.contextmanager
def lock_workdir(folder: str | os.PathLike) -> Iterator[None]:
  """Holds a run's folder, made if missing, so that a second run is refused.

  Two runs in a folder would delete each other's half-written checkpoints. The
  system lets go of the folder however the process ends. File systems that
  can't lock are trusted.

  Args:
    folder: of the run; one process of a run holds it for all.

  Raises:
    ConfigError: it is a file, holds a model that is no run, or is held.
  """
  if "://" in str(folder):
    # `experiment.build` says why not; no folder named `gs:` is made here.
    yield
    return
  path = pathlib.Path(folder)
  if path.exists() and not path.is_dir():
    raise ConfigError(f"--workdir={folder} is a file; a folder is expected.")
  _require_run(path)
  path.mkdir(parents=True, exist_ok=True)
  with (path / LOCK).open("a+", encoding="utf-8") as file:
    if not _lock(file):
      file.seek(0)
      raise ConfigError(
        f"--workdir={folder} is in use by {file.read() or 'another process'}."
        " Wait for it, end it, or give another folder."
      )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    yield


def _lock(file: IO[str]) -> bool:
  """Whether nobody else holds the file, as far as can be told."""
  if fcntl is None:
    return True
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    # A file system that can't lock.
    return True
  return True


def _require_run(folder: pathlib.Path) -> None:
  """Refuses a folder whose config.json is not one that a run has written."""
  config = folder / "config.json"
  if not config.is_file():
    return
  try:
    found = json.loads(config.read_bytes())
  except ValueError:
    # Cut short: training writes it again.
    return
  if not isinstance(found, dict) or "objectives" not in found:
    raise ConfigError(
      f"--workdir={folder} holds a config.json that is no run's (an exported"
      " model?), and a run would replace it: give another folder."
    )
