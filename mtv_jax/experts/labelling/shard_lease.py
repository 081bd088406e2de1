"""Who labels which shard: claims, as files in the folder of the labels.

`.NAME.claim` holds who made it, and is touched as long as that process lives.
It can be taken over from a process that is known to be dead, or has not
touched it for `atomic.STALE_SECONDS` by the clock of the file system. Claims
save work and no more: a shard that two processes label at the same time comes
out the same, and its files are replaced whole.

To take over is to make the next claim, `.NAME.claim.1`, and never to move or
replace the one before: whoever looks in between would find none. A claim counts
if there is no other one of a living process. Everybody looks for others after
making their own, so of two the later one to look sees the other and gives way.
That needs no more of a file system than that one of several can make a file;
locks would end with their process, and are none on some shared folders.
"""

from __future__ import annotations

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

  def _file(self, name: str, number: int = 0) -> pathlib.Path:
    return self._folder / f".{name}.claim{f'.{number}' if number else ''}"

  def _files(self, name: str) -> Iterator[pathlib.Path]:
    """Where claims on a shard are; the first there may be before others.

    That one is most often all there is to see, and a folder long to list.
    """
    first = self._file(name)
    yield first
    for file in sorted(self._folder.glob(f"{glob.escape(first.name)}.*")):
      if file.suffix[1:].isdigit():
        yield file

  @contextlib.contextmanager
  def take(self, name: str) -> Iterator[bool]:
    """Claims a shard, and lets go of it at the end.

    Yields:
      Whether it could be had; False if somebody else is at it.
    """
    claim = self._claim(name)
    if claim is None:
      yield False
      return
    file, handle = claim
    try:
      with _touched(handle):
        yield True
    finally:
      _let_go(file, handle)

  def _claim(self, name: str) -> tuple[pathlib.Path, int] | None:
    """This process's claim, open; None if there is one of another."""
    file = self._file(name)
    handle = _create(file)
    if handle is None:
      left = self._left(name)
      if left is None:
        return None
      file = self._file(name, 1 + max(map(_number, left), default=0))
      handle = _create(file)
      if handle is None:
        return None
    with contextlib.ExitStack() as otherwise:
      otherwise.callback(_let_go, file, handle)
      said = {
        "host": socket.gethostname(),
        "owner": str(atomic.current_process()),
      }
      os.write(handle, json.dumps(said).encode())
      left = self._left(name, but=file)
      if left is None:
        return None
      self._clean(name, left)
      otherwise.pop_all()
    return file, handle

  def _left(
    self, name: str, *, but: pathlib.Path | None = None
  ) -> list[pathlib.Path] | None:
    """Claims of processes that are gone; None if there is one of another."""
    left = []
    for file in self._files(name):
      if file == but:
        continue
      try:
        if not atomic.is_abandoned(file, _read(file).owner):
          return None
      except FileNotFoundError:
        continue
      left.append(file)
    return left

  def _clean(self, name: str, left: list[pathlib.Path]) -> None:
    """Removes claims of processes that are gone, and their half a shard."""
    for file in left:
      # If another is there by now, its process sees ours and gives way.
      file.unlink(missing_ok=True)
    if left:
      atomic.remove_abandoned(self._folder, name=f"{name}.")
      atomic.remove_abandoned(self._folder, name=f"{name}_")

  def holder(self, name: str) -> Claim | None:
    """Who has claimed a shard, the last one."""
    for file in sorted(self._files(name), key=_number, reverse=True):
      with contextlib.suppress(FileNotFoundError):
        return _read(file)
    return None

  def sweep(self) -> None:
    """Removes what dead processes have left in the folder, of any shard."""
    atomic.remove_abandoned(self._folder)
    for pattern in (".*.claim", ".*.claim.[1-9]*"):
      for file in self._folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
          if atomic.is_abandoned(file, _read(file).owner):
            file.unlink()


def _number(file: pathlib.Path) -> int:
  """How many claims a claim has taken the place of."""
  last = file.suffix[1:]
  return int(last) if last.isdigit() else 0


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
    while not done.wait(atomic.STALE_SECONDS / _TOUCHES):
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
  try:
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(handle), file.stat()):
        file.unlink()
  finally:
    os.close(handle)
