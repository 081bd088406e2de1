"""Leases: files by which processes divide named pieces of work.

`.NAME.claim` names its process, which keeps updating the modification time. A
lease expires when its process is known to be dead, or hasn't updated it for
`atomic.STALE_SECONDS` by the file system's clock. Leases only avoid duplicate
work. Results must not depend on them: rarely, two processes do one piece.

A takeover creates the next lease, `.NAME.claim.1`, before it removes the old
one, so that a lease always exists. A lease is valid if no other live process
has one. Every process checks this after creating its lease, and of two
processes the later one yields. This needs only exclusive file creation, since
some shared file systems lack locks.
"""

import contextlib
import dataclasses
import glob
import json
import os
import pathlib
import socket
import threading
from collections.abc import Iterator

from mtv_jax.utils import atomic
from mtv_jax.utils.atomic import Owner

_RENEWALS_PER_EXPIRY = 10


@dataclasses.dataclass(frozen=True)
class Lease:
  """Content of a lease file; `owner` is None if the file is corrupt."""

  host: str
  owner: Owner | None

  def __str__(self) -> str:
    if self.owner is None:
      return "an unknown process"
    return f"process {self.owner.pid} on {self.host}"


class Leases:
  """This process's leases in a folder, such as a label set."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def _files(self, name: str) -> Iterator[pathlib.Path]:
    """Yields the lease files of a name; the first may not exist.

    It is tried first because listing a large folder is slow.
    """
    yield self._folder / f".{name}.claim"
    pattern = f".{glob.escape(name)}.claim.*"
    for file in sorted(self._folder.glob(pattern)):
      if file.suffix[1:].isdigit():
        yield file

  @contextlib.contextmanager
  def acquire(self, name: str) -> Iterator[bool]:
    """Leases a name; yields False if another process has leased it."""
    if (lease := self._try_acquire(name)) is None:
      yield False
      return
    try:
      with _renewed(lease[1]):
        yield True
    finally:
      _release(*lease)

  def _try_acquire(self, name: str) -> tuple[pathlib.Path, int] | None:
    """Returns file and handle of a new lease; None if already leased."""
    file = self._folder / f".{name}.claim"
    if (handle := _create(file)) is None:
      if (expired := self._expired(name)) is None:
        return None
      number = 1 + max(map(_number, expired), default=0)
      file = file.with_name(f"{file.name}.{number}")
      if (handle := _create(file)) is None:
        return None
    with contextlib.ExitStack() as on_failure:
      on_failure.callback(_release, file, handle)
      owner = str(atomic.current_process())
      content = json.dumps({"host": socket.gethostname(), "owner": owner})
      os.write(handle, content.encode())
      if (expired := self._expired(name, ignore=file)) is None:
        return None
      for old in expired:
        # A process that just replaced it sees the new lease and yields.
        old.unlink(missing_ok=True)
      for prefix in (f"{name}.", f"{name}_") if expired else ():
        atomic.remove_abandoned(self._folder, name=prefix)
      on_failure.pop_all()
    return file, handle

  def _expired(
    self, name: str, *, ignore: pathlib.Path | None = None
  ) -> list[pathlib.Path] | None:
    """Returns expired leases; None if another process has a valid one."""
    expired = []
    for file in self._files(name):
      with contextlib.suppress(FileNotFoundError):
        if file != ignore:
          if not atomic.is_abandoned(file, _read(file).owner):
            return None
          expired.append(file)
    return expired

  def holder(self, name: str) -> Lease | None:
    """Returns the latest lease on a name."""
    for file in sorted(self._files(name), key=_number, reverse=True):
      with contextlib.suppress(FileNotFoundError):
        return _read(file)
    return None

  def sweep(self) -> None:
    """Removes all leases and temporary files of dead processes."""
    atomic.remove_abandoned(self._folder)
    find = self._folder.glob
    for file in (*find(".*.claim"), *find(".*.claim.[1-9]*")):
      with contextlib.suppress(FileNotFoundError):
        if atomic.is_abandoned(file, _read(file).owner):
          file.unlink()


def _number(file: pathlib.Path) -> int:
  """Number of takeovers before this lease."""
  last = file.suffix[1:]
  return int(last) if last.isdigit() else 0


def _create(file: pathlib.Path) -> int | None:
  with contextlib.suppress(FileExistsError):
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    return os.open(file, flags, 0o666)
  return None


def _read(file: pathlib.Path) -> Lease:
  try:
    content = json.loads(file.read_bytes())
    return Lease(str(content["host"]), Owner.parse(content["owner"]))
  except (ValueError, LookupError, TypeError, AttributeError):
    # Not written yet, or its process was killed before writing it.
    return Lease("", None)


@contextlib.contextmanager
def _renewed(handle: int) -> Iterator[None]:
  """Renews a lease in a background thread."""
  released = threading.Event()

  def renew() -> None:
    while not released.wait(atomic.STALE_SECONDS / _RENEWALS_PER_EXPIRY):
      # By handle, so that another process's lease is never renewed. Errors may
      # be transient; the next renewal tries again.
      with contextlib.suppress(OSError):
        os.utime(handle)

  thread = threading.Thread(target=renew, name="lease", daemon=True)
  thread.start()
  try:
    yield
  finally:
    released.set()
    thread.join()


def _release(file: pathlib.Path, handle: int) -> None:
  try:
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(handle), file.stat()):
        file.unlink()
  finally:
    os.close(handle)
