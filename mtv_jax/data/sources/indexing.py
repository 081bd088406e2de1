"""Building the table of a data set's blocks, on one or several hosts.

Until it is complete, the folder `blocks.parts` has a table for each shard that
was read. Hosts lease the shards that they read: none is read twice, even after
a kill.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path, PurePath
from typing import Any

from mtv_jax.data.sources import array_record, block_table, parquet, webdataset
from mtv_jax.data.sources.block_table import (
  NAME,
  BlockTable,
  Columns,
  of_file,
  read_states,
)
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError, WorkerError
from mtv_jax.utils.leases import Jobs, open_leases, run_jobs
from mtv_jax.utils.text import list_first
from mtv_jax.utils.threads import (
  available_cores,
  end_with_parent,
  map_threads,
)

# Returns the columns of a file's blocks, without `shard`.
Scan = Callable[[PurePath], Columns]
PARTS = "blocks.parts"
_INTERVAL = 5.0  # Seconds between checks of other hosts' progress.


def choose_scan(kind: str, records: int) -> tuple[Scan, int]:
  """Returns the scan of a type of source, and the records per block.

  Tars are cut into blocks of `records` records. Blocks are row groups in
  Parquet and whole files in ArrayRecord, both with the number 0.
  """
  if kind == "webdataset":
    return functools.partial(webdataset.scan, records=records), records
  return {"parquet": parquet.scan, "array_record": array_record.scan}[kind], 0


def build(
  files: Sequence[PurePath],
  scan: Scan,
  *,
  per_block: int,
  folder: PurePath | None = None,
  processes: int | None = None,
  announce: Callable[[Sequence[int]], None] = lambda sizes: None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> BlockTable:
  """Builds and writes the table of files of one folder.

  Several hosts may build a table together: they divide the files. Files that
  an earlier command read with the same `per_block` are read again only if they
  changed.

  Args:
    files: shards of one folder.
    scan: returns the columns of a file's blocks, without `shard`; called in
      worker processes.
    per_block: target number of records per block of `scan`.
    folder: where to write the table; default: the files' folder.
    processes: default: one per core.
    announce: called once, with the sizes of the files to read, in bytes.
    progress: called with the numbers of finished and of all files.
  """
  if len({file.parent for file in files}) > 1:
    raise InputError("The shards are in several folders; index each by itself.")
  folder = folder or files[0].parent
  if not path_lib.is_remote(folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
  _check_complete(files, folder)
  states = dict(zip(files, read_states(files), strict=True))
  table_state = _read_state(folder / NAME)
  tables = _find_parts(states, folder, per_block)
  missing = {f: state for f, state in states.items() if f not in tables}
  announce([size for size, _ in missing.values()])
  count = min(processes or available_cores(), len(files))
  # Not forked, which is unsafe with the threads of bucket clients.
  context = multiprocessing.get_context("spawn")
  stop_event = context.Event()
  options = dict(initializer=_start_worker, initargs=(stop_event,))
  table = None
  with (
    _explain_killed(),
    futures.ProcessPoolExecutor(count, context, **options) as pool,
  ):
    while missing:
      scans = _ScanJobs(missing, folder, scan, per_block, table_state)
      jobs = {pool.submit(scans.run) for _ in range(count)}
      try:
        while jobs:
          done, jobs = futures.wait(jobs, _INTERVAL, futures.FIRST_COMPLETED)
          for job in done:
            job.result()
          progress(len(files) - len(scans.list_pending()), len(files))
      except BaseException:
        stop_event.set()
        raise
      # The parts are verified once, by the host that joins them.
      with open_leases(folder).acquire(NAME) as acquired:
        if acquired:
          table_state = _read_state(folder / NAME)
          tables |= _find_parts(missing, folder, per_block)
          missing = {f: s for f, s in missing.items() if f not in tables}
          if not missing:
            table = _write_joint([tables[f] for f in files], states, folder)
      if missing:
        time.sleep(_INTERVAL)
  if table is None:
    table = _write_joint([tables[f] for f in files], states, folder)
  open_leases(folder).clear()
  return table


def _check_complete(files: Sequence[PurePath], folder: PurePath) -> None:
  """Raises InputError if a new table would lack shards of the old one."""
  try:
    old_files = block_table.read(folder / NAME).files
  except (MissingFileError, InputError):  # No table, or a damaged one.
    return
  names = {file.name for file in files}
  present = set(path_lib.list_folder(files[0].parent))
  if dropped := [f.name for f in old_files if f.name in present - names]:
    raise InputError(
      f"The table of blocks in {folder} has {len(dropped)} other shards that"
      f" still exist: {list_first(dropped, 3)}. Index all shards of the folder"
      " at once, or choose another --output."
    )


@contextlib.contextmanager
def _explain_killed() -> Iterator[None]:
  try:
    yield
  except futures.process.BrokenProcessPool as error:
    raise WorkerError(
      "A process that read shards was killed or crashed, often for lack of"
      " memory. Run this again, with fewer processes; finished shards are not"
      " read again."
    ) from error


def _write_joint(
  tables: Sequence[BlockTable],
  states: Mapping[PurePath, tuple[int, str]],
  folder: PurePath,
) -> BlockTable:
  if read_states(list(states)) != list(states.values()):
    raise InputError("Shards changed while they were read. Run this again.")
  table = block_table.join(tables)
  table.write(folder / NAME)
  if not path_lib.is_remote(folder):
    atomic.remove_abandoned(Path(folder), name=f"{NAME}.")
  with contextlib.suppress(MissingFileError):
    path_lib.remove_folder(folder / PARTS)
  return table


@dataclasses.dataclass(frozen=True)
class _ScanJobs:
  """Jobs that read shards, each into a part, shared by all hosts."""

  missing: Mapping[PurePath, tuple[int, str]]
  folder: PurePath  # Folder of the table.
  scan: Scan
  per_block: int
  table_state: tuple[int, int] | None  # Changes when the parts are joined.

  def run(self) -> None:
    """Reads shards until this or other processes have read all."""
    run_jobs(open_leases(self.folder), self.list_pending)

  def list_pending(self) -> Jobs:
    """Returns the shards that no process has read."""
    names = set(path_lib.list_folder(self.folder / PARTS))
    table_state = _read_state(self.folder / NAME)
    if (_stopped and _stopped.is_set()) or table_state != self.table_state:
      return {}
    parts = {f: _part_path(self.folder, f) for f in self.missing}
    files = [f for f, part in parts.items() if part.name not in names]
    return {f.name: functools.partial(self._read, f) for f in files}

  def _read(self, file: PurePath) -> bool:
    if _stopped.is_set():
      raise futures.CancelledError
    table_state = _read_state(self.folder / NAME)
    part = _part_path(self.folder, file)
    if path_lib.exists(part) or table_state != self.table_state:
      return False
    state, columns = self.missing[file], self.scan(file)
    table = of_file(file, state, columns, per_block=self.per_block)
    table.write(part)
    return True


_stopped: Any = None  # Set once a process of this host has failed.


def _start_worker(stopped: Any) -> None:
  global _stopped
  _stopped = stopped
  end_with_parent()


def _part_path(folder: PurePath, file: PurePath) -> PurePath:
  """Path of a shard's own table, while the joint table is built."""
  return folder / PARTS / f"{file.name}.npz"


def _read_state(file: PurePath) -> tuple[int, int] | None:
  with contextlib.suppress(FileNotFoundError):
    stat = path_lib.stat(file)
    return stat.st_size, stat.st_mtime_ns
  return None


def _find_parts(
  states: Mapping[PurePath, tuple[int, str]], folder: PurePath, per_block: int
) -> dict[PurePath, BlockTable]:
  """Returns the tables of unchanged files that are in a table or a part.

  Removes other parts, so that their shards are read again.
  """
  names = set(path_lib.list_folder(folder / PARTS))
  parts = {f: _part_path(folder, f) for f in states}
  parts = {f: part for f, part in parts.items() if part.name in names}
  files = [f for f in (folder / NAME,) if path_lib.exists(f)]
  tables = _read_parts([*files, *parts.values()], states)
  tables = {f: t for f, t in tables.items() if t.per_block == per_block}
  map_threads(path_lib.remove, [p for f, p in parts.items() if f not in tables])
  return tables


def _read_parts(
  tables: Iterable[PurePath], states: Mapping[PurePath, tuple[int, str]]
) -> dict[PurePath, BlockTable]:
  """Reads tables; returns the table of each file that has its state."""

  def try_read(file: PurePath) -> BlockTable | None:
    # Another host may have removed it, and a damaged one is replaced.
    with contextlib.suppress(InputError, FileNotFoundError):
      return block_table.read(file)

  files_by_name = {file.name: file for file in states}
  parts_by_file = {}
  for table in map_threads(try_read, tables):
    # A table without blocks is falsy, too.
    for part in () if table is None else table.split():
      file = files_by_name.get(part.files[0].name)
      # `make_shards` writes no version: take the store's.
      if file and part.has_state(states[file]):
        versions = (states[file][1],)
        parts_by_file[file] = dataclasses.replace(
          part, files=(file,), versions=versions
        )
  return parts_by_file
