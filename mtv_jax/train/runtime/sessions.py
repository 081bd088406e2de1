"""Sessions of a run: run.json and the liveness file.

A session is the part of a run from a start, resume or rollback to an exit.

  run.json   code, packages, devices, steps and exit of each session
  alive      rewritten while the loop runs: its age shows whether it still runs,
             its content the step: {"step": 1200, "activity": "train", ...}

Process 0 writes both.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import mtv_jax
from mtv_jax.config.options import plugin_digest
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.threads import available_cores

log = logging.getLogger(__name__)

RECORD, ALIVE = "run.json", "alive"
ALIVE_SECONDS = 15.0  # Minimum interval between writes of the file.
PACKAGES = ("jax", "jaxlib", "flax", "optax")
PACKAGES += ("orbax-checkpoint", "grain", "numpy", "libtpu")


class Session(contextlib.AbstractContextManager):
  """This process's session: appends to run.json, writes the liveness file.

  `devices` are the result of `describe_devices`; these, the `command` and
  further `facts` are recorded. Logs write errors as warnings.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    start_step: int,
    devices: Mapping[str, Any],
    command: str = "",
    process_index: int = 0,
    facts: Mapping[str, Any] | None = None,
  ):
    self.folder = pathlib.Path(workdir)
    self.step = start_step
    self._sessions: list[dict[str, Any]] = []  # Empty except on process 0.
    self._is_active = process_index == 0
    if not self._is_active:
      return
    self._activity: str | None = None
    self._last_write = 0.0
    self._has_warned = False
    sessions = read_sessions(workdir)
    if sessions and not sessions[-1].get("ended"):
      sessions[-1] |= self._describe_unreported_exit()
    self._record = {
      "started": _format_time(time.time()),
      "ended": None,
      "exit": None,
      "start_step": start_step,
      "last_step": None,
      "host": socket.gethostname(),
      "revision": code_revision(),
      "command": command,
      "packages": package_versions(),
      **devices,
      **(facts or {}),
    }
    self._sessions = [*sessions, self._record]
    with self._tolerate_errors():
      self.folder.mkdir(parents=True, exist_ok=True)
    self._write_record()
    self.report(start_step, "start")

  def report(self, step: int, activity: str = "train") -> None:
    """Writes the liveness file if due; `step` is the number of updates done."""
    self.step = step
    if not self._is_active:
      return
    now = time.monotonic()
    is_due = now - self._last_write >= ALIVE_SECONDS
    if not is_due and activity == self._activity:
      return
    self._last_write, self._activity = now, activity
    content = {
      "step": step,
      "activity": activity,
      "time": _format_time(time.time()),
      "host": socket.gethostname(),
      "process": os.getpid(),
    }
    with self._tolerate_errors():
      atomic.write(self.folder / ALIVE, json.dumps(content).encode() + b"\n")

  def _describe_unreported_exit(self) -> dict[str, Any]:
    """Exit fields of the previous session, if it did not write them."""
    alive = read_alive(self.folder) or {}
    return {
      "ended": alive.get("time", "unknown"),
      "exit": "without a report",
      "last_step": alive.get("step"),
    }

  def _write_record(self) -> None:
    content = {"name": self.folder.absolute().name, "sessions": self._sessions}
    with self._tolerate_errors():
      text = json.dumps(content, indent=1) + "\n"
      atomic.write(self.folder / RECORD, text.encode())

  def record_compilation(
    self, objectives: Sequence[str], seconds: float
  ) -> None:
    """Records the time to compile a step, for `estimate_compilation`."""
    if self._is_active:
      times = self._record.setdefault("compile_seconds", {})
      times[", ".join(objectives)] = round(seconds, 1)

  def estimate_compilation(self, objectives: Sequence[str]) -> float | None:
    """Seconds of the longest compilation of these objectives' step so far.

    Shorter compilations read the compilation cache. None if run.json has none.
    """
    records = (s.get("compile_seconds") for s in self._sessions)
    times = [r for r in records if isinstance(r, Mapping)]
    name = ", ".join(objectives)
    return max((r[name] for r in times if name in r), default=None)

  @contextlib.contextmanager
  def _tolerate_errors(self):
    try:
      yield
    except OSError as error:
      if not self._has_warned:
        log.warning("run.json and alive are not written: %s", error)
      self._has_warned = True
    else:
      self._has_warned = False

  def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
    self.close(error)

  def close(self, error: BaseException | None) -> None:
    """Writes the session's end and its reason to run.json."""
    if not self._is_active:
      return
    reason = "finished"
    if error is not None:
      lines = str(error).splitlines() or [""]
      reason = f"{type(error).__name__}: {lines[0][:300]}"
    self.report(self.step, "exit")
    self._record |= {
      "ended": _format_time(time.time()),
      "exit": reason,
      "last_step": self.step,
    }
    self._write_record()


def read_alive(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """Reads the liveness file; None if missing or unreadable."""
  content = path_lib.read_json(path_lib.as_path(workdir) / ALIVE, tolerant=True)
  return content if isinstance(content, dict) else None


def seconds_since(alive: Mapping[str, Any]) -> float:
  """Age of a liveness file's content by this machine's clock; 0 if unknown."""
  try:
    written = datetime.datetime.fromisoformat(alive["time"]).timestamp()
  except (KeyError, TypeError, ValueError):
    return 0.0
  return time.time() - written


def read_sessions(
  workdir: str | os.PathLike, *, tolerant: bool = True
) -> list[dict[str, Any]]:
  """Reads the sessions of a run, oldest first; empty without a record.

  An unreadable record counts as missing if `tolerant`.
  """
  file = path_lib.as_path(workdir) / RECORD
  content = path_lib.read_json(file, tolerant=tolerant)
  sessions = content.get("sessions") if isinstance(content, dict) else None
  sessions = sessions if isinstance(sessions, list) else []
  return [session for session in sessions if isinstance(session, dict)]


def describe_devices() -> dict[str, Any]:
  """Kind and number of devices, processes and their cores, for run.json."""
  import jax  # Imported late: the supervisor reads files without it.

  return {
    "device_kind": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "cores": available_cores(),
  }


def code_revision() -> str:
  """MTV_JAX_REVISION if set, else the git revision, else the version.

  The git revision ends in "-dirty" if the checkout has changes.
  """
  if revision := os.environ.get("MTV_JAX_REVISION"):
    return revision
  package = pathlib.Path(mtv_jax.__file__).parent
  git = ["git", "-C", str(package)]
  try:
    # Fails if installed in a virtual environment inside another repository.
    tracked = [*git, "ls-files", "--error-unmatch", "__init__.py"]
    describe = ["describe", "--always", "--dirty", "--abbrev=40"]
    for command in (tracked, [*git, *describe, "--exclude=*"]):
      result = subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=True
      )
    return result.stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return mtv_jax.__version__


def code_digest(config: Mapping[str, Any] | None = None) -> str:
  """Hash of the package's source files, without recipes, and of plug-ins.

  Recipes are inside an installed package, but beside it in a checkout.
  """
  package, digest = pathlib.Path(mtv_jax.__file__).parent, hashlib.blake2b()
  for file in sorted(package.rglob("*.py")):
    name = file.relative_to(package)
    if name.parts[0] != "configs":
      digest.update(f"{name}\n".encode() + file.read_bytes())
  digest.update(plugin_digest(config or {}).encode())
  return digest.hexdigest()[:16]


def package_versions() -> dict[str, str]:
  """Versions of the main packages that a run depends on."""
  versions = {"mtv_jax": mtv_jax.__version__}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return versions


def _format_time(seconds: float) -> str:
  """Formats a Unix time as UTC ISO 8601, to the second."""
  when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  return when.isoformat(timespec="seconds")
