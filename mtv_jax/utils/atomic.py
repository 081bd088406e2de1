"""Files that appear whole, and what those leave behind that were killed.

Until it is complete, a file is `.NAME.OWNER.tmp` beside its place. The owner
is the process that writes it, so that another one can tell what a dead process
has left from what a living one is writing; on shared folders by its age.
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

# Seconds after which a file that nobody touched is somebody's who is gone.
STALE_SECONDS = 300.0

_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8}-\d+-[0-9a-f]{8})\.\d+\.tmp")
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Owner:
  """A process of some machine.

  Attributes:
    machine: a hash; machines that run at the same time have different ones,
      and so have containers that can't see each other's processes.
    pid: of the process there.
    token: random, as numbers of processes come again.
  """

  machine: str
  pid: int
  token: str

  def __str__(self) -> str:
    return f"{self.machine}-{self.pid}-{self.token}"

  @classmethod
  def parse(cls, text: str) -> "Owner | None":
    """The owner that was written as `text`; None if it is none."""
    machine, _, rest = text.partition("-")
    pid, _, token = rest.partition("-")
    return cls(machine, int(pid), token) if pid.isdigit() else None

  @property
  def is_dead(self) -> bool:
    """Whether it is of this machine and runs no more."""
    mine = current_process()
    if self == mine or self.machine != mine.machine:
      return False
    # Another's with this process's number was there before it.
    return self.pid == mine.pid or not _runs(self.pid)


def current_process() -> Owner:
  """This process."""
  return _owner(os.getpid())


@functools.cache
def _owner(pid: int) -> Owner:
  # By its number, so that a fork is not its parent.
  parts = [socket.gethostname()]
  for read in (
    lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(),
    lambda: os.readlink("/proc/self/ns/pid"),
  ):
    try:
      parts.append(read())
    except OSError:
      parts.append("")  # No Linux.
  machine = hashlib.blake2b("\n".join(parts).encode(), digest_size=4)
  return Owner(machine.hexdigest(), pid, secrets.token_hex(4))


def _runs(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:
    pass  # It is somebody else's.
  return True


def temporary_path(file: pathlib.Path) -> pathlib.Path:
  """Where to write what becomes `file`; a new place each time."""
  return file.with_name(
    f".{file.name}.{current_process()}.{next(_numbers)}.tmp"
  )


def fsync(file: pathlib.Path) -> None:
  """Waits until a file's bytes are on the disk.

  Else a machine that fails may keep a new name and lose what is in it.
  """
  handle = os.open(file, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def write(file: pathlib.Path, data: bytes) -> None:
  """Writes a file; a reader sees the whole of it or what was there before."""
  aside = temporary_path(file)
  try:
    aside.write_bytes(data)
    fsync(aside)
    os.replace(aside, file)
  except BaseException:
    aside.unlink(missing_ok=True)
    raise


def write_if_absent(file: pathlib.Path, data: bytes) -> bytes:
  """Writes a file unless there is one; of several writers one wins.

  Returns:
    What the file holds.
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
        # No links on this file system: the last of several wins there.
        if not file.exists():
          os.replace(aside, file)
    finally:
      aside.unlink(missing_ok=True)
  return file.read_bytes()


def seconds_since_modified(file: pathlib.Path) -> float:
  """Seconds since a file was last touched, by the clock of its file system.

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
  """Whether the owner of an unfinished file is gone, as far as can be told.

  Raises:
    FileNotFoundError: the file is gone.
  """
  if owner is not None and owner.is_dead:
    return True
  return (
    owner != current_process() and seconds_since_modified(file) > STALE_SECONDS
  )


def remove_abandoned(folder: pathlib.Path, *, name: str = "") -> int:
  """Removes temporary files whose owners are gone.

  Args:
    folder: to look in.
    name: how the names of files begin that are looked at; by default all.

  Returns:
    How many.
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
