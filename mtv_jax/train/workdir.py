"""A run's folder: its lock and its recorded config."""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import filelock

from mtv_jax.utils.errors import ConfigError

LOCK, OWNER = ".lock", ".lock.owner"


@contextlib.contextmanager
def lock_workdir(folder: str | os.PathLike) -> Iterator[None]:
  """Locks a run's folder, created if missing, so that a second run is rejected.

  Two runs would delete each other's unfinished checkpoints. One process locks
  it for all, until it exits. File systems that can't lock are trusted.

  Raises:
    ConfigError: it is a file, contains a model that is not a run, or is locked.
  """
  if "://" in str(folder):
    # `build_experiment` rejects it; no folder named `gs:` is created here.
    yield
    return
  path = pathlib.Path(folder)
  if path.exists() and not path.is_dir():
    raise ConfigError(f"--workdir={folder} is a file; a folder is expected.")
  read_recorded_config(path)
  path.mkdir(parents=True, exist_ok=True)
  owner = path / OWNER
  lock = filelock.FileLock(path / LOCK, timeout=0, fallback_to_soft=False)
  try:
    lock.acquire()
  except filelock.Timeout:
    by = owner.read_text() if owner.exists() else "another process"
    raise ConfigError(
      f"--workdir={folder} is locked by {by}. Wait, or give another folder."
    ) from None
  except (NotImplementedError, OSError):
    yield
    return
  try:
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    yield
  finally:
    lock.release()


def read_recorded_config(folder: str | os.PathLike) -> dict[str, Any]:
  """The resolved config of the run in a folder.

  Empty if there is none, or a crash truncated it: training writes it again.

  Raises:
    ConfigError: config.json was not written by a run.
  """
  path = pathlib.Path(folder) / "config.json"
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_bytes())
  except ValueError:
    return {}
  if not isinstance(content, dict) or "objectives" not in content:
    raise ConfigError(
      f"--workdir={folder} contains a config.json that is not a run's (an"
      " exported model?) and would be replaced. Give another folder."
    )
  return content
