"""Atomic writes, and removal of the temporary files of killed processes.

A file or folder is written as `.NAME.OWNER.NUMBER.tmp` and renamed when it is
complete. The owner is the writing process. A temporary file is abandoned if its
owner ran on this machine and is dead, or after `STALE_SECONDS`.
"""

import contextlib
import ctypes
import errno
import functools
import glob
import hashlib
import itertools
import os
import pathlib
import re
import secrets
import shutil
import socket
from collections.abc import Collection, Iterator
from typing import NamedTuple

from mtv_jax.utils.errors import InputError

STALE_SECONDS = 300.0

_OWNED = r"\..+\.([0-9a-f]{8}-\d+-[0-9a-f]{8})\.\d+"
_TEMPORARY = re.compile(_OWNED + r"\.tmp")
# The old folder during a replacement, on systems that can't exchange folders.
_REPLACED = re.compile(_OWNED + r"\.old")
_numbers = itertools.count()
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)


class Owner(NamedTuple):
  """A process, with an identifier unique among machines that share a folder."""

  machine: str  # Hash of the host and its process namespace.
  pid: int
  token: str  # Random, because process ids are reused.

  def __str__(self) -> str:
    return f"{self.machine}-{self.pid}-{self.token}"

  @classmethod
  def parse(cls, text: str) -> "Owner | None":
    """The inverse of `str`; None if malformed."""
    machine, _, rest = text.partition("-")
    pid, _, token = rest.partition("-")
    return cls(machine, int(pid), token) if pid.isdigit() else None

  @property
  def is_dead(self) -> bool:
    """Whether the process ran on this machine and has exited."""
    current = current_process()
    if self == current or self.machine != current.machine:
      return False
    if self.pid == current.pid:  # An earlier process with this id.
      return True
    try:
      os.kill(self.pid, 0)
    except ProcessLookupError:
      return True
    except OSError:
      pass  # Another user's process.
    return False


@functools.cache
def current_process() -> Owner:
  """Returns this process as an owner."""
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):  # Not Linux.
    boot_id = pathlib.Path("/proc/sys/kernel/random/boot_id")
    parts += [boot_id.read_text(), os.readlink("/proc/self/ns/pid")]
  machine = hashlib.blake2b("\n".join(parts).encode(), digest_size=4)
  return Owner(machine.hexdigest(), os.getpid(), secrets.token_hex(4))


os.register_at_fork(after_in_child=current_process.cache_clear)


def temporary_path(file: pathlib.Path) -> pathlib.Path:
  """Returns a new temporary path next to `file`."""
  owner, number = current_process(), next(_numbers)
  return file.with_name(f".{file.name}.{owner}.{number}.tmp")


def is_temporary(path: pathlib.Path) -> bool:
  """Whether the name belongs to an unfinished file or folder."""
  return _TEMPORARY.fullmatch(path.name) is not None


@contextlib.contextmanager
def replace_file(file: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path; renames it to `file` on success.

  Readers see the old or the new content, never a part. Pipes and devices
  (`/dev/stdout`) are written directly; links are followed.
  """
  if file.exists() and not (file.is_file() or file.is_dir()):
    yield file
    return
  if file.is_symlink():
    file = file.resolve()
  temporary = temporary_path(file)
  try:
    yield temporary
    _sync_file(temporary)
    os.replace(temporary, file)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):  # Add the file's name.
      error.filename = error.filename or os.fspath(file)
    raise
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(
  folder: pathlib.Path, *, replaced: Collection[str] = ()
) -> Iterator[pathlib.Path]:
  """Yields a temporary folder; renames it to `folder` on success.

  Readers see the old or the new folder, never a mix, even after a kill. Starts
  by removing this folder's abandoned temporaries. Files of an existing folder
  are kept unless `replaced` names them. Raises InputError if the folder can't
  be renamed because it is a mount point.
  """
  folder = folder.resolve()
  folder.parent.mkdir(parents=True, exist_ok=True)
  remove_abandoned(folder.parent, name=f"{folder.name}.")
  _restore_replaced(folder)
  temporary = temporary_path(folder)
  temporary.mkdir()
  try:
    yield temporary
    for file in temporary.rglob("*"):
      # A sparse file without blocks has no data to sync.
      if file.is_file() and file.stat().st_blocks:
        _sync_file(file)
    if folder.exists():
      _link_kept_files(folder, temporary, replaced)
    try:
      _exchange_folders(temporary, folder)
    except OSError as error:
      if error.errno not in (errno.EBUSY, errno.EXDEV):
        raise
      raise InputError(
        f"{folder} can't be replaced ({error.strerror}): it is a mount point."
        " Choose a folder inside it."
      ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _sync_file(file: pathlib.Path) -> None:
  """Fsyncs, since a machine crash could keep the rename but lose the data."""
  with file.open("rb") as stream:
    os.fsync(stream.fileno())


def _link_kept_files(
  folder: pathlib.Path, temporary: pathlib.Path, replaced: Collection[str]
) -> None:
  """Links files that are not in `replaced` into the new folder."""

  def link(source: str, target: str) -> None:
    if not os.path.exists(target):
      try:
        os.link(source, target)
      except OSError:  # The file system lacks hard links.
        shutil.copy2(source, target)

  def ignore(parent: str, names: list[str]) -> list[str]:
    is_top = pathlib.Path(parent) == folder
    return [n for n in names if is_top and n in replaced]

  options = dict(symlinks=True, ignore=ignore, dirs_exist_ok=True)
  shutil.copytree(folder, temporary, copy_function=link, **options)


def _exchange_folders(temporary: pathlib.Path, folder: pathlib.Path) -> None:
  """Swaps two folders: the old content ends up under `temporary`."""
  if not folder.exists() or not any(folder.iterdir()):
    os.replace(temporary, folder)
    return
  renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
  if renameat2 is not None:
    paths = (_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(folder))
    if renameat2(*paths, _RENAME_EXCHANGE) == 0:
      return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
      raise OSError(code, os.strerror(code), str(folder))
  # Some network file systems, or not Linux: the folder is absent for a moment.
  old = temporary_path(folder).with_suffix(".old")
  os.utime(folder)  # Tells other machines that this process is alive.
  os.replace(folder, old)
  os.replace(temporary, folder)
  shutil.rmtree(old, ignore_errors=True)


def _restore_replaced(folder: pathlib.Path) -> None:
  """Undoes or completes an `_exchange_folders` whose process was killed."""
  for old in folder.parent.glob(f".{glob.escape(folder.name)}.*.old"):
    match = _REPLACED.fullmatch(old.name)
    with contextlib.suppress(FileNotFoundError):
      if not match or not is_abandoned(old, Owner.parse(match[1])):
        continue
      if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
      else:
        os.replace(old, folder)


def write(file: pathlib.Path, data: bytes) -> None:
  """Writes a file with `replace_file`."""
  with replace_file(file) as temporary:
    temporary.write_bytes(data)


def write_text(file: str | os.PathLike, text: str) -> None:
  """Writes a UTF-8 file with `replace_file`; lone surrogates become '?'."""
  write(pathlib.Path(file), text.encode("utf-8", "replace"))


def write_if_absent(file: pathlib.Path, data: bytes) -> bytes:
  """Writes a file unless another writer has; returns the file's content."""
  if not file.exists():
    temporary = temporary_path(file)
    try:
      temporary.write_bytes(data)
      try:
        os.link(temporary, file)
      except OSError:
        if not file.exists():  # No hard links here: the last writer wins.
          os.replace(temporary, file)
    finally:
      temporary.unlink(missing_ok=True)
  return file.read_bytes()


def seconds_since_modified(file: pathlib.Path) -> float:
  """Age of a file, or of a folder's newest file, by the file system's clock."""
  clock_file = temporary_path(file)
  try:
    clock_file.touch()
    files = [file, *file.rglob("*")] if file.is_dir() else [file]
    latest = max(f.lstat().st_mtime for f in files)
    return clock_file.stat().st_mtime - latest
  finally:
    clock_file.unlink(missing_ok=True)


def is_abandoned(file: pathlib.Path, owner: Owner | None) -> bool:
  """Whether an unfinished file's owner is dead or inactive for too long."""
  if owner is not None and (owner.is_dead or owner == current_process()):
    return owner.is_dead
  return seconds_since_modified(file) > STALE_SECONDS


def remove_abandoned(folder: pathlib.Path, *, name: str = "") -> None:
  """Removes abandoned temporaries whose final names begin with `name`."""
  for file in folder.glob(f".{glob.escape(name)}*.tmp"):
    match = _TEMPORARY.fullmatch(file.name)
    with contextlib.suppress(FileNotFoundError):
      if match and is_abandoned(file, Owner.parse(match[1])):
        if file.is_dir():
          shutil.rmtree(file, ignore_errors=True)
        else:
          file.unlink()
