"""Leases that divide named pieces of work among processes.

A lease names its process, which keeps renewing it. It expires when its process
is known to be dead, or hasn't renewed it for `atomic.STALE_SECONDS`. Leases
only avoid duplicate work. Results must not depend on them: in rare cases, two
processes do one piece.
"""

import abc
import contextlib
import dataclasses
import glob
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from mtv_jax.utils import atomic, buckets
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.atomic import Owner

log = logging.getLogger(__name__)

# Work by name; a job returns False if another process has done it.
Jobs = Mapping[str, Callable[[], bool]]

_RENEWALS_PER_EXPIRY = 10
# Seconds between checks of other processes' jobs, doubling, up to this fraction
# of the time after which a lease expires.
_MIN_WAIT, _MAX_WAIT_FRACTION = 0.2, 0.05
# Jobs are listed again after this many jobs of other processes, or seconds.
_MAX_MISSES, _MAX_AGE = 16, 300.0


@dataclasses.dataclass(frozen=True)
class Lease:
  """Content of a lease; `owner` is None if it is corrupt."""

  host: str
  owner: Owner | None

  def __str__(self) -> str:
    if self.owner is None:
      return "an unknown process"
    return f"process {self.owner.pid} on {self.host}"

  @classmethod
  def parse(cls, data: bytes) -> "Lease":
    try:
      content = json.loads(data)
      return cls(str(content["host"]), Owner.parse(content["owner"]))
    except (ValueError, LookupError, TypeError, AttributeError):
      # Not written yet, or its process was killed before writing it.
      return cls("", None)


def _encode_lease(**fields: str) -> bytes:
  """Encodes a lease of this process."""
  owner = str(atomic.current_process())
  content = {"host": socket.gethostname(), "owner": owner, **fields}
  return json.dumps(content).encode()


class Leases(abc.ABC):
  """This process's leases in a folder, such as a label set."""

  @contextlib.contextmanager
  def acquire(self, name: str) -> Iterator[bool]:
    """Leases a name; yields False if another process has leased it."""
    if (lease := self._try_acquire(name)) is None:
      yield False
      return
    try:
      with _keep_renewed(lease):
        yield True
    finally:
      lease.release()

  @abc.abstractmethod
  def _try_acquire(self, name: str) -> "_FileHandle | _ObjectHandle | None":
    """Returns a new lease; None if already leased."""

  @abc.abstractmethod
  def holder(self, name: str) -> Lease | None:
    """Returns the latest lease on a name."""

  @abc.abstractmethod
  def clear(self) -> None:
    """Removes all leases once all work is done, and dead processes' files."""


def open_leases(folder: pathlib.PurePath) -> Leases:
  """Returns the leases in a folder of a file system or a bucket."""
  if path_lib.is_remote(folder):
    return ObjectLeases(folder)
  return FileLeases(pathlib.Path(folder))


def run_jobs(leases: Leases, list_jobs: Callable[[], Jobs]) -> None:
  """Runs jobs that no other process runs, until none is listed.

  Starts at a random job and continues with the next one, which may share a file
  with it; if another process has that job, continues at a random one.
  """
  rng, wait = secrets.SystemRandom(), _MIN_WAIT
  while jobs := list_jobs():
    names, has_worked, misses = list(jobs), False, 0
    index, deadline = rng.randrange(len(names)), time.monotonic() + _MAX_AGE
    while names:
      index %= len(names)
      name = names.pop(index)
      with leases.acquire(name) as acquired:
        if acquired and jobs[name]():
          has_worked = True
        else:
          misses, index = misses + 1, rng.randrange(len(jobs))
      is_old = misses >= _MAX_MISSES or time.monotonic() > deadline
      if has_worked and is_old:
        break
    if has_worked:
      wait = _MIN_WAIT
      continue
    if wait == _MIN_WAIT:
      holders = [(name, leases.holder(name)) for name in list(jobs)[:3]]
      examples = [f"{name} ({lease})" for name, lease in holders if lease]
      more = ", ..." * (len(jobs) > 3)
      log.info(
        f"All work is leased: waiting for {len(jobs)} parts of other"
        f" hosts: {', '.join(examples)}{more}."
      )
    time.sleep(wait)
    wait = min(2 * wait, _MAX_WAIT_FRACTION * atomic.STALE_SECONDS)


@contextlib.contextmanager
def _keep_renewed(lease: "_FileHandle | _ObjectHandle") -> Iterator[None]:
  """Renews a lease in a background thread."""
  released = threading.Event()

  def renew() -> None:
    while not released.wait(atomic.STALE_SECONDS / _RENEWALS_PER_EXPIRY):
      # Errors may be transient; the next renewal tries again.
      with contextlib.suppress(OSError):
        lease.renew()

  thread = threading.Thread(target=renew, name="lease", daemon=True)
  thread.start()
  try:
    yield
  finally:
    released.set()
    thread.join()


class FileLeases(Leases):
  """Leases that are files, `.NAME.claim`.

  Their age is measured by the file system's clock. A takeover creates the next
  lease, `.NAME.claim.1`, before it removes the old one, so that a lease always
  exists. A lease is valid if no other live process has one. Every process
  checks this after creating its lease, and the later of two processes yields.
  This needs only exclusive file creation, since some shared file systems lack
  locks.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def _list_files(self, name: str) -> Iterator[pathlib.Path]:
    """Yields the lease files of a name; the first may not exist.

    It is tried first because listing a large folder is slow.
    """
    yield self._folder / f".{name}.claim"
    pattern = f".{glob.escape(name)}.claim.*"
    for file in sorted(self._folder.glob(pattern)):
      if file.suffix[1:].isdigit():
        yield file

  def _try_acquire(self, name: str) -> "_FileHandle | None":
    file = self._folder / f".{name}.claim"
    if (handle := _create_exclusively(file)) is None:
      if (expired := self._find_expired(name)) is None:
        return None
      number = 1 + max(map(_get_number, expired), default=0)
      file = file.with_name(f"{file.name}.{number}")
      if (handle := _create_exclusively(file)) is None:
        return None
    with contextlib.ExitStack() as on_failure:
      lease = _FileHandle(file, handle)
      on_failure.callback(lease.release)
      os.write(handle, _encode_lease())
      if (expired := self._find_expired(name, ignore=file)) is None:
        return None
      for old in expired:
        # A process that just replaced it sees the new lease and yields.
        old.unlink(missing_ok=True)
      for prefix in (f"{name}.", f"{name}_") if expired else ():
        atomic.remove_abandoned(self._folder, name=prefix)
      on_failure.pop_all()
    return lease

  def _find_expired(
    self, name: str, *, ignore: pathlib.Path | None = None
  ) -> list[pathlib.Path] | None:
    """Returns expired leases; None if another process has a valid one."""
    expired = []
    for file in self._list_files(name):
      with contextlib.suppress(FileNotFoundError):
        if file != ignore:
          owner = Lease.parse(file.read_bytes()).owner
          if not atomic.is_abandoned(file, owner):
            return None
          expired.append(file)
    return expired

  def holder(self, name: str) -> Lease | None:
    for file in sorted(self._list_files(name), key=_get_number, reverse=True):
      with contextlib.suppress(FileNotFoundError):
        return Lease.parse(file.read_bytes())
    return None

  def clear(self) -> None:
    atomic.remove_abandoned(self._folder)
    find = self._folder.glob
    for file in (*find(".*.claim"), *find(".*.claim.[1-9]*")):
      file.unlink(missing_ok=True)


def _get_number(file: pathlib.Path) -> int:
  """Number of takeovers before this lease."""
  suffix = file.suffix[1:]
  return int(suffix) if suffix.isdigit() else 0


def _create_exclusively(file: pathlib.Path) -> int | None:
  with contextlib.suppress(FileExistsError):
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    return os.open(file, flags, 0o666)
  return None


@dataclasses.dataclass(frozen=True)
class _FileHandle:
  """A lease file with its descriptor, to renew only this process's lease."""

  file: pathlib.Path
  descriptor: int

  def renew(self) -> None:
    """Renews it, unless another process has taken it over."""
    os.utime(self.descriptor)

  def release(self) -> None:
    """Removes it, unless another process has taken it over."""
    try:
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(self.descriptor), self.file.stat()):
          self.file.unlink()
    finally:
      os.close(self.descriptor)


class ObjectLeases(Leases):
  """Leases that are objects in a bucket, `.NAME.claim`.

  Every write depends on the object's generation, so that only one process
  acquires, renews or takes over. A lease is stale if its generation doesn't
  change for `atomic.STALE_SECONDS` after this process has read it: clocks may
  differ.
  """

  def __init__(self, folder: pathlib.PurePath):
    self._folder = folder
    # Generation, and time of its first read, by name.
    self._seen: dict[str, tuple[bytes, float]] = {}

  def _object_path(self, name: str) -> pathlib.PurePath:
    return self._folder / f".{name}.claim"

  def _try_acquire(self, name: str) -> "_ObjectHandle | None":
    content, generation = buckets.read_with_generation(self._object_path(name))
    if content is not None and not self._is_stale(name, content, generation):
      return None
    lease = _ObjectHandle(self._object_path(name), generation)
    lease.renew()
    return lease if lease.generation else None

  def _is_stale(self, name: str, data: bytes, generation: bytes) -> bool:
    owner = Lease.parse(data).owner
    if owner is not None and (
      owner.is_dead or owner == atomic.current_process()
    ):
      return owner.is_dead
    now = time.monotonic()
    if name not in self._seen or self._seen[name][0] != generation:
      self._seen[name] = generation, now
    return now - self._seen[name][1] > atomic.STALE_SECONDS

  def holder(self, name: str) -> Lease | None:
    content, _ = buckets.read_with_generation(self._object_path(name))
    return None if content is None else Lease.parse(content)

  def clear(self) -> None:
    for name in path_lib.list_folder(self._folder, prefix="."):
      if name.endswith(".claim"):
        path_lib.remove(self._folder / name)


class _ObjectHandle:
  """A lease object; `generation` is None once another process has it."""

  def __init__(self, path: pathlib.PurePath, generation: bytes | None):
    self.path, self.generation = path, generation

  def renew(self) -> None:
    if self.generation is not None:
      # Some stores derive the generation from the content.
      data = _encode_lease(renewal=secrets.token_hex(8))
      self.generation = buckets.write_if(self.path, data, self.generation)

  def release(self) -> None:
    if self.generation is not None:
      buckets.remove_if(self.path, self.generation)
