"""Atomic writes, and removal of the temporary files of killed processes.

A file is written as `.NAME.OWNER.NUMBER.tmp` and renamed when it is complete.
The owner is the writing process. Temporary files of this machine's dead
processes are abandoned at once, those of other machines after `STALE_SECONDS`.
"""

import contextlib
import functools
import glob
import hashlib
import itertools
import os
import pathlib
import re
import secrets
import socket
from collections.abc import Iterator
from typing import NamedTuple

STALE_SECONDS = 300.0

_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8}-\d+-[0-9a-f]{8})\.\d+\.tmp")
_numbers = itertools.count()


class Owner(NamedTuple):
  """A process, identified over all machines that share a folder."""

  machine: str  # A hash of the host and its process namespace.
  pid: int  # On that machine.
  token: str  # Random, as process numbers are reused.

  def __str__(self) -> str:
    return f"{self.machine}-{self.pid}-{self.token}"

  @classmethod
  def parse(cls, text: str) -> "Owner | None":
    """The inverse of `str`; None for other strings."""
    machine, _, rest = text.partition("-")
    pid, _, token = rest.partition("-")
    return cls(machine, int(pid), token) if pid.isdigit() else None

  @property
  def is_dead(self) -> bool:
    """Whether it ran on this machine and has exited."""
    current = current_process()
    if self == current or self.machine != current.machine:
      return False
    if self.pid == current.pid:  # An earlier process of this number.
      return True
    try:
      os.kill(self.pid, 0)
    except ProcessLookupError:
      return True
    except OSError:
      pass  # A process of another user.
    return False


def current_process() -> Owner:
  """This process."""
  # Cached by process number, since a fork is another owner.
  return _current_owner(os.getpid())


@functools.cache
def _current_owner(pid: int) -> Owner:
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):  # Not Linux.
    boot_id = pathlib.Path("/proc/sys/kernel/random/boot_id")
    parts += [boot_id.read_text(), os.readlink("/proc/self/ns/pid")]
  machine = hashlib.blake2b("\n".join(parts).encode(), digest_size=4)
  return Owner(machine.hexdigest(), pid, secrets.token_hex(4))


def temporary_path(file: pathlib.Path) -> pathlib.Path:
  """A new temporary path beside `file`."""
  return file.with_name(
    f".{file.name}.{current_process()}.{next(_numbers)}.tmp"
  )


@contextlib.contextmanager
def replace_file(file: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path, and renames it to `file` on success.

  Readers see the old content or the new one, never a part.
  """
  temporary = temporary_path(file)
  try:
    yield temporary
    # Without it, a crash of the machine may keep the rename and lose the bytes.
    with temporary.open("rb") as stream:
      os.fsync(stream.fileno())
    os.replace(temporary, file)
  finally:
    temporary.unlink(missing_ok=True)


def write(file: pathlib.Path, data: bytes) -> None:
  """Writes a file with `replace_file`."""
  with replace_file(file) as temporary:
    temporary.write_bytes(data)


def write_if_absent(file: pathlib.Path, data: bytes) -> bytes:
  """Writes a file unless it exists; of several writers one wins.

  Returns:
    The file's content.
  """
  if not file.exists():
    temporary = temporary_path(file)
    try:
      temporary.write_bytes(data)
      try:
        os.link(temporary, file)
      except FileExistsError:
        pass
      except OSError:
        # No hard links on this file system: the last writer wins.
        if not file.exists():
          os.replace(temporary, file)
    finally:
      temporary.unlink(missing_ok=True)
  return file.read_bytes()


def seconds_since_modified(file: pathlib.Path) -> float:
  """Seconds since a file was modified, by the file system's clock.

  Raises:
    FileNotFoundError: the file does not exist.
  """
  clock = temporary_path(file)
  try:
    clock.touch()
    return clock.stat().st_mtime - file.stat().st_mtime
  finally:
    clock.unlink(missing_ok=True)


def is_abandoned(file: pathlib.Path, owner: Owner | None) -> bool:
  """Whether the owner of an unfinished file is dead or silent for too long.

  Raises:
    FileNotFoundError: the file does not exist.
  """
  if owner is not None and owner.is_dead:
    return True
  return (
    owner != current_process() and seconds_since_modified(file) > STALE_SECONDS
  )


def remove_abandoned(folder: pathlib.Path, *, name: str = "") -> int:
  """Removes abandoned temporary files of a folder and returns their number.

  Args:
    folder: the files' folder.
    name: how the names of the complete files start.
  """
  removed = 0
  for file in folder.glob(f".{glob.escape(name)}*.tmp"):
    match = _TEMPORARY.fullmatch(file.name)
    with contextlib.suppress(FileNotFoundError):
      if match and is_abandoned(file, Owner.parse(match[1])):
        file.unlink()
        removed += 1
  return removed
