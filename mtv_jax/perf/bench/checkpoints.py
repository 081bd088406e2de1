"""Checkpoint benchmark: save and restore against disk speed and step time."""

import os
import pathlib
import statistics
import tempfile

import jax
import numpy as np

from mtv_jax.checkpoint import checksums
from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.config.sections import Config
from mtv_jax.perf.bench import harness
from mtv_jax.perf.bench.step import StepTimer
from mtv_jax.utils.tree import flatten_with_names

_CHUNK, _CHUNKS = 1 << 24, 16  # Bytes per write, number of writes.


def run(
  config: Config,
  *,
  steps: int = 10,
  saves: int = 3,
  every: int = 100,
  folder: str | None = None,
) -> harness.BenchResult:
  """Times saves and restores of a train state, and the steps during a save.

  Args:
    config: a config as `train` takes it.
    steps: number of steps to time without a save.
    saves: number of saves to time during steps.
    every: steps between saves, for the share of the run.
    folder: folder on the disk to test; default: the system's temporary folder.
  """
  timer = StepTimer(config)
  with tempfile.TemporaryDirectory(dir=folder) as temporary:
    path = pathlib.Path(temporary)
    disk_speeds = measure_disk_speed(path)
    with Checkpointer(path / "checkpoints", every_steps=every, keep=1) as saver:
      with harness.Stopwatch() as saving:
        saver.save(1, timer.state)
        saver.wait()
        disk_bytes = drop_page_cache(path / "checkpoints" / "1")
      arrays = dict(flatten_with_names(timer.state))
      checksum = harness.time_call(lambda: checksums.describe_arrays(arrays))
      abstract = timer.run.train_step.abstract
      with harness.Stopwatch() as restoring:
        jax.block_until_ready(saver.restore(abstract).state)
      # The first step after a pause is slow.
      timer.time_step()
      step = timer.median_step(steps)
      costs = [_time_save(timer, saver, 2 + i, step) for i in range(saves)]
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(timer.state))
  overhead = [blocked + slowed for blocked, slowed in costs]
  blocked, slowed = (statistics.median(x) for x in zip(*costs, strict=True))
  result = harness.BenchResult(
    batch_size=timer.run.config.batch_size,
    devices=harness.describe_devices(),
    every=every,
  )
  add = result.add
  add("state_bytes", size, "state", "{:.0f} MB", 1e6)
  add("disk_bytes", disk_bytes, "  on disk", "{:.0f} MB", 1e6)
  add("disk", disk_speeds)
  text = "{{:.0f}} MB/s; disk alone {:.0f} MB/s".format
  label, limit = "save, until on disk", text(disk_speeds["write"] / 1e6)
  add("save", size / saving.wall, label, limit, 1e6)
  template = f"{{:.2f}} s ({checksum / saving.wall:.1%} of the save)"
  add("checksum", checksum, "  its checksums", template)
  limit = text(disk_speeds["read"] / 1e6)
  add("restore", size / restoring.wall, "restore", limit, 1e6)
  add("step", step, "a step", "{:.2f} s")
  add("blocked", blocked, "save() blocks the loop", "{:.2f} s")
  add("slowed", slowed, "slowdown of later steps, total", "{:.2f} s")
  add("stolen", overhead)
  median = statistics.median(overhead)
  text = f"{min(overhead):.2f} to {max(overhead):.2f} s per save, {saves} saves"
  share = median / (every * step + median)
  add("share", share, "share of the run", f"{{:.2%}} ({text})")
  return result


def _time_save(
  timer: StepTimer, saver: Checkpointer, number: int, step_seconds: float
) -> tuple[float, float]:
  """Returns the seconds that a save blocks the loop and slows later steps."""
  blocked = harness.time_call(lambda: saver.save(number, timer.state))
  times = []
  while saver.saving:
    times.append(timer.time_step())
  times.append(timer.time_step())
  saver.wait()
  return blocked, sum(times) - step_seconds * len(times)


def measure_disk_speed(folder: pathlib.Path) -> dict[str, float]:
  """Measures bytes per second of writes with fsync and uncached reads."""
  data = np.random.default_rng(0).integers(0, 256, _CHUNK, np.uint8).tobytes()
  path = folder / "speed.bin"
  try:
    with harness.Stopwatch() as writing, path.open("wb", buffering=0) as file:
      for _ in range(_CHUNKS):
        file.write(data)
      os.fsync(file.fileno())
    drop_page_cache(path)
    with harness.Stopwatch() as reading, path.open("rb", buffering=0) as file:
      while file.read(_CHUNK):
        pass
  finally:
    path.unlink(missing_ok=True)
  total = _CHUNKS * _CHUNK
  return {"write": total / writing.wall, "read": total / reading.wall}


def drop_page_cache(path: pathlib.Path) -> int:
  """Drops a folder's files from the page cache; returns their total bytes."""
  files = [p for p in (path, *path.rglob("*")) if p.is_file()]
  for file in files:
    with file.open("rb") as handle:
      os.fsync(handle.fileno())
      if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  return sum(file.stat().st_size for file in files)
