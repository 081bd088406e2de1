"""Who labels which shard: claims, as files in the folder of the labels.

`.NAME.claim` holds who made it, and is touched as long as that process lives.
It can be taken over from a process that is known to be dead, or has not
touched it for `atomic.STALE` seconds by the clock of the file system. Claims
save work and no more: a shard that two processes label at the same time comes
out the same, and its files are replaced whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import threading
from collections.abc import Iterator

from mtv_jax.data import atomic
from mtv_jax.data.atomic import Owner

_TOUCHES = 10  # in the time after which a claim is stale


@dataclasses.dataclass(frozen=True)
class Claim:
  """What a claim's file says.

  Attributes:
    host: a name, for people.
    owner: None where the file is damaged.
  """

  host: str
  owner: Owner | None

  def __str__(self) -> str:
    if self.owner is None:
      return "an unknown process"
    return f"process {self.owner.pid} on {self.host}"


class Claims:
  """Claims of this process on the shards of a folder.

  Args:
    folder: of the labels.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def _file(self, name: str) -> pathlib.Path:
    return self._folder / f".{name}.claim"

  @contextlib.contextmanager
  def take(self, name: str) -> Iterator[bool]:
    """Claims a shard, and lets go of it at the end.

    Yields:
      Whether it could be had; False if somebody else is at it.
    """
    file = self._file(name)
    handle = _create(file)
    if handle is None and self._remove_left(name):
      handle = _create(file)
    if handle is None:
      yield False
      return
    with os.fdopen(handle, "wb", buffering=0) as stream:
      said = {"host": socket.gethostname(), "owner": str(atomic.me())}
      stream.write(json.dumps(said).encode())
      with _touched(handle):
        try:
          yield True
        finally:
          _let_go(file, handle)

  def _remove_left(self, name: str) -> bool:
    """Removes the claim of a process that is gone, and its half a shard."""
    file = self._file(name)
    aside = atomic.temporary(file)
    try:
      claim = _read(file)
      if not atomic.is_left(file, claim.owner):
        return False
      os.rename(file, aside)
    except FileNotFoundError:
      # It was let go of, or somebody else is taking it over.
      return not file.exists()
    try:
      if _read(aside) != claim:
        # Somebody was faster, and this is the claim that they made since.
        with contextlib.suppress(OSError):
          os.link(aside, file)
        return False
    finally:
      aside.unlink(missing_ok=True)
    atomic.sweep(self._folder, name=f"{name}.")
    atomic.sweep(self._folder, name=f"{name}_")
    return True

  def holder(self, name: str) -> Claim | None:
    """Who has claimed a shard."""
    try:
      return _read(self._file(name))
    except FileNotFoundError:
      return None

  def sweep(self) -> None:
    """Removes what dead processes have left in the folder, of any shard."""
    atomic.sweep(self._folder)
    for file in self._folder.glob(".*.claim"):
      with contextlib.suppress(FileNotFoundError):
        if atomic.is_left(file, _read(file).owner):
          file.unlink()


def _create(file: pathlib.Path) -> int | None:
  flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
  try:
    return os.open(file, flags, 0o644)
  except FileExistsError:
    return None


def _read(file: pathlib.Path) -> Claim:
  try:
    said = json.loads(file.read_bytes())
    return Claim(str(said["host"]), Owner.parse(said["owner"]))
  except (ValueError, LookupError, TypeError, AttributeError):
    # Its process was killed between making and writing it, or is about to
    # write it.
    return Claim("", None)


@contextlib.contextmanager
def _touched(handle: int) -> Iterator[None]:
  """Meanwhile, a thread keeps a file young."""
  done = threading.Event()

  def touch() -> None:
    while not done.wait(atomic.STALE / _TOUCHES):
      # By its handle, not to touch a claim that others have made since. A
      # file system that can't answer now may do so the next time.
      with contextlib.suppress(OSError):
        os.utime(handle)

  thread = threading.Thread(target=touch, name="claim", daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _let_go(file: pathlib.Path, handle: int) -> None:
  with contextlib.suppress(FileNotFoundError):
    if os.path.samestat(os.fstat(handle), file.stat()):
      file.unlink()
