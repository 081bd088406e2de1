"""JSON-lines files that stay intact on full disks and after kills."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from mtv_jax.utils import atomic

# Maximum rows to buffer while a file can't be written; drops the oldest.
MAX_PENDING = 100_000

RowPredicate = Callable[[Mapping[str, Any]], bool]


class JsonlFile:
  """Rows of a run by step, one JSON object per line.

  A row is on disk when `append` returns. If it raises, the row is buffered and
  written by the next `append` that succeeds.
  """

  def __init__(
    self,
    path: pathlib.Path,
    *,
    start_step: int = 0,
    keep_row: RowPredicate = lambda row: False,
  ):
    """Drops rows after `start_step` unless `keep_row`; 0 drops all rows."""
    self.path = path
    _drop_after(path, start_step, keep_row)
    self._pending: list[bytes] = []

  def append(self, row: Mapping[str, Any]) -> None:
    """Appends a row."""
    self._pending.append(json.dumps(row).encode() + b"\n")
    del self._pending[:-MAX_PENDING]
    # Opened each time: mounted buckets store a file only when it is closed, and
    # writes to a deleted file would succeed silently.
    fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
      end = _end_of_last_row(fd)
      try:
        # All or nothing, to avoid duplicate rows.
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
  """Truncates an incomplete last line; returns the file's size."""
  size = os.fstat(fd).st_size
  end = size
  while end and os.pread(fd, 1, end - 1) != b"\n":
    end -= 1
  if end < size:
    os.ftruncate(fd, end)
  return end


def _drop_after(path: pathlib.Path, step: int, keep_row: RowPredicate) -> None:
  """Drops rows after a step, and a last line truncated by a crash."""
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
  """Parses a row with a step; None if invalid."""
  try:
    row = json.loads(line)
    return {**row, "step": float(row["step"])}
  except (ValueError, KeyError, TypeError):
    return None
