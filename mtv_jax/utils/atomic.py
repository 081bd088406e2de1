"""Atomic writes, and the removal of temporary files of killed processes.

A file is written as `.NAME.OWNER.tmp` and renamed when it is complete. The
owner is the process that writes it, so that temporary files of dead processes
can be told from those of living ones; of other machines' processes, by age.
"""

import dataclasses
import functools
import glob
import hashlib
import itertools
import os
import pathlib
import re
import secrets
import socket

# A temporary file of this age is abandoned, whichever machine wrote it.
STALE_SECONDS = 300.0

_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8}-\d+-[0-9a-f]{8})\.\d+\.tmp")
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Owner:
  """A process, identified over all machines that share a folder.

  Attributes:
    machine: a hash of the host and its process namespace.
    pid: process number on that machine.
    token: random, as process numbers are reused.
  """

  machine: str
  pid: int
  token: str

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
    """Whether it is of this machine and has exited."""
    mine = current_process()
    if self == mine or self.machine != mine.machine:
      return False
    # A process with this one's number is an earlier one.
    return self.pid == mine.pid or not _runs(self.pid)


def current_process() -> Owner:
  """This process."""
  return _owner(os.getpid())


@functools.cache
def _owner(pid: int) -> Owner:
  # Cached by number, so that a fork is not its parent.
  parts = [socket.gethostname()]
  for read in (
    lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(),
    lambda: os.readlink("/proc/self/ns/pid"),
  ):
    try:
      parts.append(read())
    except OSError:
      parts.append("")  # Not Linux.
  machine = hashlib.blake2b("\n".join(parts).encode(), digest_size=4)
  return Owner(machine.hexdigest(), pid, secrets.token_hex(4))


def _runs(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:
    pass  # A process of another user.
  return True


def temporary_path(file: pathlib.Path) -> pathlib.Path:
  """A new temporary path beside `file`."""
  return file.with_name(
    f".{file.name}.{current_process()}.{next(_numbers)}.tmp"
  )


def fsync(file: pathlib.Path) -> None:
  """Waits until a file's bytes are on the disk.

  Without it, a crash of the machine may keep a rename and lose the content.
  """
  handle = os.open(file, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def write(file: pathlib.Path, data: bytes) -> None:
  """Writes a file; readers see the old content or the new one, never a part."""
  aside = temporary_path(file)
  try:
    aside.write_bytes(data)
    fsync(aside)
    os.replace(aside, file)
  except BaseException:
    aside.unlink(missing_ok=True)
    raise


def write_if_absent(file: pathlib.Path, data: bytes) -> bytes:
  """Writes a file unless it exists; of several writers one wins.

  Returns:
    The file's content.
  """
  if not file.exists():
    aside = temporary_path(file)
    try:
      aside.write_bytes(data)
      try:
        os.link(aside, file)
      except FileExistsError:
        pass
      except OSError:
        # No hard links on this file system: the last writer wins.
        if not file.exists():
          os.replace(aside, file)
    finally:
      aside.unlink(missing_ok=True)
  return file.read_bytes()


def seconds_since_modified(file: pathlib.Path) -> float:
  """Seconds since a file was last touched, by the file system's clock.

  Raises:
    FileNotFoundError: it is gone.
  """
  touched = temporary_path(file)
  try:
    touched.touch()
    now = touched.stat().st_mtime
  finally:
    touched.unlink(missing_ok=True)
  return now - file.stat().st_mtime


def is_abandoned(file: pathlib.Path, owner: Owner | None) -> bool:
  """Whether the owner of an unfinished file has exited, as far as is known.

  Raises:
    FileNotFoundError: the file is gone.
  """
  if owner is not None and owner.is_dead:
    return True
  return (
    owner != current_process() and seconds_since_modified(file) > STALE_SECONDS
  )


def remove_abandoned(folder: pathlib.Path, *, name: str = "") -> int:
  """Removes temporary files whose owners have exited.

  Args:
    folder: to look in.
    name: only files whose names start like this.

  Returns:
    The number of removed files.
  """
  removed = 0
  for file in folder.glob(f".{glob.escape(name)}*.tmp"):
    match = _TEMPORARY.fullmatch(file.name)
    try:
      if match and is_abandoned(file, Owner.parse(match[1])):
        file.unlink()
        removed += 1
    except FileNotFoundError:
      continue
  return removed
