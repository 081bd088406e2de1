"""Files of JSON lines that stay whole: on full disks, after kills."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from mtv_jax.utils import atomic

# Rows that wait for a file that can't be written; older ones are dropped.
MAX_PENDING = 100_000

RowPredicate = Callable[[Mapping[str, Any]], bool]


class JsonlFile:
  """Rows of a run by step, one JSON object a line.

  A row is on the disk when `append` returns. Rows that can't be written are
  written before the next one that can.
  """

  def __init__(
    self,
    path: pathlib.Path,
    *,
    start_step: int = 0,
    keep_row: RowPredicate = lambda row: False,
  ):
    """Drops the rows after `start_step`, except some; 0 drops all."""
    self.path = path
    _drop_after(path, start_step, keep_row)
    self._pending: list[bytes] = []

  def append(self, row: Mapping[str, Any]) -> None:
    """Appends a row."""
    self._pending.append(json.dumps(row).encode() + b"\n")
    del self._pending[:-MAX_PENDING]
    # Opened each time: mounted buckets store a file when it is closed, and a
    # handle of a file that was deleted would take rows without an error.
    fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
      end = _end_of_last_row(fd)
      try:
        # All or nothing, so that no row is in the file twice.
        data = memoryview(b"".join(self._pending))
        while data:
          data = data[os.write(fd, data) :]
        os.fsync(fd)
      except OSError:
        os.ftruncate(fd, end)
        raise
    finally:
      os.close(fd)
    self._pending.clear()


def _end_of_last_row(fd: int) -> int:
  """The size of a file, after truncating a last line without its end."""
  size = os.fstat(fd).st_size
  end = size
  while end and os.pread(fd, 1, end - 1) != b"\n":
    end -= 1
  if end < size:
    os.ftruncate(fd, end)
  return end


def _drop_after(path: pathlib.Path, step: int, keep_row: RowPredicate) -> None:
  """Drops the rows after a step, and a last line that a crash truncated."""
  if not path.exists():
    return
  text = path.read_text(encoding="utf-8", errors="replace")
  lines = text.splitlines() if step else []
  new = "".join(
    f"{line}\n"
    for line, row in zip(lines, map(_parse, lines), strict=True)
    if row and (row["step"] <= step or keep_row(row))
  )
  if new != text:
    atomic.write(path, new.encode())


def _parse(line: str) -> dict[str, Any] | None:
  """A row with a step; None for a line that is not one."""
  try:
    row = json.loads(line)
    return {**row, "step": float(row["step"])}
  except (ValueError, KeyError, TypeError):
    return None
