"""Offset index of a tar, for random access to its records.

An index is a file of a few dozen bytes a record, read through a memory map, so
that 100 million records cost address space and not memory. There is one for
each tar: a tar that is added or replaced costs its own index only, and hosts
that start together share the work.

Layout, little-endian: a `HEADER`, then `count` times an `ENTRY`, then the
keys in UTF-8, end to end, then the smallest and the largest key. Records
without a caption come last, so that leaving them out is leaving out the tail.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path

import numpy as np

from mtv_jax.data.sources import tar_scan
from mtv_jax.data.sources.tar_scan import TarError
from mtv_jax.utils import atomic
from mtv_jax.utils.cores import available_cores

log = logging.getLogger(__name__)

_MAGIC = b"MTVTAR01"
HEADER = np.dtype(
  [
    ("magic", "S8"),
    ("tar_size", "<u8"),
    ("tar_time", "<i8"),  # nanoseconds
    ("count", "<u8"),
    ("captioned", "<u8"),
    ("keys_size", "<u8"),
    ("smallest_size", "<u4"),
    ("largest_size", "<u4"),
    ("no_image", "<u4"),
    ("others", "<u4"),
  ]
)
ENTRY = np.dtype(
  [
    ("image", "<u8"),
    ("text", "<u8"),
    ("json", "<u8"),
    ("image_size", "<u4"),
    ("text_size", "<u4"),
    ("json_size", "<u4"),
    ("key_end", "<u4"),
  ]
)
_SAY_EVERY = 15.0  # seconds
# From this many missing indices on, starting processes pays.
_MANY = 64
_MAX_HELPERS = 15


@dataclasses.dataclass(frozen=True)
class TarIndex:
  """What is known of one tar without opening its index again.

  Attributes:
    tar, file: the tar and the file of its index.
    tar_size: bytes of the tar when it was indexed.
    count: records with an image.
    captioned: those of them with a .txt or .json; they come first.
    keys_size: bytes of all keys.
    no_image: groups without an image, left out.
    others: members that belong to no record.
    smallest, largest: the least and the greatest key.
  """

  tar: Path
  file: Path
  tar_size: int
  count: int
  captioned: int
  keys_size: int
  no_image: int
  others: int
  smallest: str
  largest: str

  def open(self) -> tuple[np.ndarray, np.ndarray]:
    """Entries [count] and the keys' bytes, both in one memory map."""
    split = HEADER.itemsize + self.count * ENTRY.itemsize
    whole = np.memmap(self.file, np.uint8, "r").view(np.ndarray)
    entries = whole[HEADER.itemsize : split].view(ENTRY)
    return entries, whole[split : split + self.keys_size]

  def read_keys(self) -> list[str]:
    """All keys, in order."""
    entries, blob = self.open()
    data = blob.tobytes()
    ends = entries["key_end"].tolist()
    return [data[a:b].decode() for a, b in itertools.pairwise([0, *ends])]


def index_file(tar: Path, index_dir: Path | None) -> Path:
  """Where the index of `tar` is kept."""
  if index_dir is None:
    return tar.with_name(tar.name + ".index")
  # Tars of several folders share names such as 00000.tar.
  folder = hashlib.blake2s(os.path.abspath(tar.parent).encode(), digest_size=4)
  return index_dir / f"{tar.stem}-{folder.hexdigest()}{tar.suffix}.index"


def build_all(
  tars: Sequence[Path],
  *,
  index_dir: Path | None = None,
  threads: int = 16,
) -> list[TarIndex]:
  """The indices of `tars`, in their order, built where there is none.

  Each is written to a temporary file and renamed, so that any number of
  processes may do this at the same time, also on several hosts: they share the
  work. Threads wait for the disk; if many indices are missing, helper
  processes are started for the parsing.

  Raises:
    TarError: names all tars that can't be used, with the reason for each.
    OSError: if an index must be written and can't be.
  """
  with _helpers(tars, index_dir):
    result = _build(tars, index_dir, threads)
  if result.errors:
    errors = [result.errors[i] for i in sorted(result.errors)]
    raise _all_of(errors, len(tars))
  if result.built:
    log.info("Indexed %d of %d tars.", result.built, len(tars))
  return [result.found[i] for i in range(len(tars))]


@dataclasses.dataclass
class _Result:
  """By the place in the list of tars; `built` counts the new indices."""

  found: dict[int, TarIndex] = dataclasses.field(default_factory=dict)
  errors: dict[int, TarError] = dataclasses.field(default_factory=dict)
  built: int = 0


def _build(
  tars: Sequence[Path], index_dir: Path | None, threads: int
) -> _Result:
  result = _Result()
  said = time.monotonic()
  # Every process starts elsewhere and finds what the others have finished.
  order = random.Random().sample(range(len(tars)), len(tars))
  with futures.ThreadPoolExecutor(min(threads, len(tars))) as pool:
    jobs = {pool.submit(_ensure, tars[i], index_dir): i for i in order}
    for job in futures.as_completed(jobs):
      try:
        result.found[jobs[job]], new = job.result()
        result.built += new
      except TarError as error:
        result.errors[jobs[job]] = error
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
      if time.monotonic() - said > _SAY_EVERY:
        said = time.monotonic()
        done = len(result.found) + len(result.errors)
        log.info("Indexing tars: %d of %d.", done, len(tars))
  return result


def _all_of(errors: list[TarError], total: int) -> TarError:
  if len(errors) == 1:
    return errors[0]
  lines = [f"{len(errors)} of {total} tars can't be used:"]
  lines += [str(error) for error in errors[:10]]
  if len(errors) > 10:
    lines.append(f"and {len(errors) - 10} more.")
  return TarError("\n".join(lines))


@contextlib.contextmanager
def _helpers(tars: Sequence[Path], index_dir: Path | None) -> Iterator[None]:
  """Processes that build indices beside this one until it is done.

  They do what this one does, as another host would. They are neither forked
  (a process that runs JAX can't be) nor `multiprocessing`'s (which imports the
  caller's script again).
  """
  if len(tars) < _MANY:
    yield
    return
  missing = sum(not index_file(tar, index_dir).exists() for tar in tars)
  count = min(available_cores() - 1, _MAX_HELPERS, missing // (_MANY // 2))
  job = json.dumps([[os.path.abspath(t) for t in tars], str(index_dir or "")])
  helpers = []
  try:
    for _ in range(count):
      helper = subprocess.Popen(
        [sys.executable, "-m", "mtv_jax.data.sources.tar_index"],
        stdin=subprocess.PIPE,
        env=dict(
          os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))
        ),
      )
      helpers.append(helper)
      with helper.stdin as pipe:
        pipe.write(job.encode())
    yield
    # All indices are there now, so they find nothing more to do.
    for helper in helpers:
      helper.wait()
  finally:
    for helper in helpers:
      helper.kill()
      helper.wait()


def _ensure(tar: Path, index_dir: Path | None) -> tuple[TarIndex, bool]:
  """The index of one tar, and whether it had to be built."""
  file = index_file(tar, index_dir)
  state = tar.stat()
  reason = "there is none"
  if file.exists():
    index, reason = _load(file, tar, state)
    if index is not None:
      return index, False
    log.warning("%s: its index %s is built again: %s.", tar, file, reason)
  data = _serialise(tar_scan.scan(tar), state, tar)
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, data)
  except OSError as error:
    raise OSError(
      f"{tar} needs an index ({reason}) and {file} can't be written"
      f" ({error.strerror or error}). Give this source an index_dir that can"
      " be written."
    ) from error
  index, reason = _load(file, tar, tar.stat())
  if index is None:
    raise TarError(f"{tar} changed while it was indexed: {reason}.")
  return index, True


def _load(
  file: Path, tar: Path, state: os.stat_result
) -> tuple[TarIndex | None, str]:
  """The index in `file`, or None and why it does not fit the tar."""
  with file.open("rb") as stream:
    head = stream.read(HEADER.itemsize)
    if len(head) < HEADER.itemsize or head[:8] != _MAGIC:
      return None, "it is no index of this version"
    header = np.frombuffer(head, HEADER)[0]
    if header["tar_size"] != state.st_size:
      return None, (
        f"the tar has {state.st_size} bytes, it was made for"
        f" {header['tar_size']}"
      )
    if header["tar_time"] != state.st_mtime_ns:
      return None, (
        f"the tar is of {_time(state.st_mtime_ns)}, it was made for one of"
        f" {_time(int(header['tar_time']))}"
      )
    count, keys_size = int(header["count"]), int(header["keys_size"])
    ends = int(header["smallest_size"]), int(header["largest_size"])
    stream.seek(HEADER.itemsize + count * ENTRY.itemsize + keys_size)
    tail = stream.read(sum(ends) + 1)
    if len(tail) != sum(ends):
      return None, "it is cut short"
  index = TarIndex(
    tar=tar,
    file=file,
    tar_size=state.st_size,
    count=count,
    captioned=int(header["captioned"]),
    keys_size=keys_size,
    no_image=int(header["no_image"]),
    others=int(header["others"]),
    smallest=tail[: ends[0]].decode(),
    largest=tail[ends[0] :].decode(),
  )
  return index, ""


def _serialise(found: tar_scan.Scan, state: os.stat_result, tar: Path) -> bytes:
  for what, keys in (
    ("no image", found.no_image),
    ("neither .txt nor .json", found.no_caption),
  ):
    if keys:
      log.warning(
        "%s: %d records have %s: %s.",
        tar,
        len(keys),
        what,
        ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else ""),
      )
  bare = set(found.no_caption)
  # A stable sort: both parts keep the tar's order.
  order = sorted(found.records, key=bare.__contains__)
  names = [key.encode() for key in order]
  entries = np.zeros(len(order), ENTRY)
  spans = np.array([found.records[key] for key in order], np.uint64)
  spans = spans.reshape(-1, 3, 2)
  for role, field in enumerate(("image", "text", "json")):
    entries[field] = spans[:, role, 0]
    entries[field + "_size"] = spans[:, role, 1]
  entries["key_end"] = np.cumsum([len(name) for name in names], dtype=np.int64)
  smallest, largest = (
    (min(order).encode(), max(order).encode()) if order else (b"", b"")
  )
  header = np.zeros(1, HEADER)
  header["magic"] = _MAGIC
  header["tar_size"] = state.st_size
  header["tar_time"] = state.st_mtime_ns
  header["count"] = len(order)
  header["captioned"] = len(order) - len(bare)
  header["keys_size"] = sum(map(len, names))
  header["smallest_size"] = len(smallest)
  header["largest_size"] = len(largest)
  header["no_image"] = len(found.no_image)
  header["others"] = found.others
  return b"".join(
    [header.tobytes(), entries.tobytes(), *names, smallest, largest]
  )


def _time(nanoseconds: int) -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))


def _help() -> None:
  """What a helper runs, told by its standard input."""
  tars, index_dir = json.load(sys.stdin)
  # Its errors are those that the process that started it reports.
  with contextlib.suppress(OSError):
    _build(
      [Path(tar) for tar in tars],
      Path(index_dir) if index_dir else None,
      # Few: what two processes happen to do at the same time is lost.
      threads=2,
    )


if __name__ == "__main__":
  _help()
