"""What saving costs: of the disk, and of the run that saves."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

import jax

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.config import schema
from mtv_jax.perf.bench import floors
from mtv_jax.perf.bench.step import Alone


@dataclasses.dataclass(frozen=True)
class CheckpointSpeed:
  """What `bench_checkpoint` measured.

  Attributes:
    state_bytes: of the arrays of the train state.
    disk_bytes: of a checkpoint, which is compressed.
    save: bytes of the state a second, until the files are on the disk.
    restore: the same back into the devices.
    disk: bytes a second of one file on the same disk.
    step: median seconds of a step while nothing is saved.
    blocked: seconds that `save` held up the loop, the median.
    slowed: further seconds that steps took longer while the save went on.
    stolen: both together, for each save.
    every: steps between two saves of the run in question.
    batch_size: of the step.
    devices: kind and number.
  """

  state_bytes: int
  disk_bytes: int
  save: float
  restore: float
  disk: floors.Disk
  step: float
  blocked: float
  slowed: float
  stolen: tuple[float, ...]
  every: int
  batch_size: int
  devices: str

  @property
  def share(self) -> float:
    """Of a run that saves every `every` steps, what saving takes, 0 to 1."""
    stolen = statistics.median(self.stolen)
    return stolen / (self.every * self.step + stolen)

  def to_json(self) -> str:
    """As one line of JSON."""
    return json.dumps({**dataclasses.asdict(self), "share": self.share})

  def __str__(self) -> str:
    mb = 1e-6
    lines = [
      f"state {self.state_bytes * mb:.0f} MB, {self.disk_bytes * mb:.0f} MB on"
      f" disk; batch {self.batch_size} on {self.devices}",
      f"{'':26}{'MB/s':>8}{'disk alone':>12}",
      f"{'save, until on disk':26}{self.save * mb:8.0f}"
      f"{self.disk.write * mb:12.0f}",
      f"{'restore':26}{self.restore * mb:8.0f}{self.disk.read * mb:12.0f}",
      f"{'a step':26}{self.step:8.2f} s",
      f"{'save() holds the loop':26}{self.blocked:8.2f} s",
      f"{'and slows steps, in all':26}{self.slowed:8.2f} s",
    ]
    low, high = min(self.stolen), max(self.stolen)
    lines.append(
      f"saving every {self.every} steps takes {self.share:.2%} of a run"
      f" ({low:.2f} to {high:.2f} s a save, {len(self.stolen)} saves)"
    )
    return "\n".join(lines)


def bench_checkpoint(
  config: schema.Config,
  *,
  steps: int = 10,
  saves: int = 3,
  every: int = 100,
  folder: str | None = None,
) -> CheckpointSpeed:
  """Saves a config's train state as a run does, and times the steps around it.

  Args:
    config: as `train.run` takes it.
    steps: to time while nothing is saved.
    saves: to time beside the steps.
    every: steps between two saves of the run that is asked about.
    folder: on the disk in question; the system's temporary one by default.
  """
  alone = Alone(config)
  with tempfile.TemporaryDirectory(dir=folder) as made:
    path = pathlib.Path(made)
    disk = floors.disk_speed(path)
    with Checkpointer(path / "checkpoints", every_steps=every, keep=1) as saver:
      begin = time.perf_counter()
      saver.save(1, alone.state)
      saver.wait()
      saved = path / "checkpoints" / "1"
      disk_bytes = floors.forget(saved)
      saving = time.perf_counter() - begin
      abstract = alone.experiment.program.abstract
      begin = time.perf_counter()
      jax.block_until_ready(saver.restore(abstract).state)
      restoring = time.perf_counter() - begin
      # Steps in the loop follow each other; the first after a pause do not.
      alone.step()
      usual = statistics.median(alone.step() for _ in range(steps))
      found = [_around(alone, saver, 2 + i, usual) for i in range(saves)]
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(alone.state))
  return CheckpointSpeed(
    state_bytes=size,
    disk_bytes=disk_bytes,
    save=size / saving,
    restore=size / restoring,
    disk=disk,
    step=usual,
    blocked=statistics.median(save.blocked for save in found),
    slowed=statistics.median(save.slowed for save in found),
    stolen=tuple(save.blocked + save.slowed for save in found),
    every=every,
    batch_size=alone.experiment.config.batch_size,
    devices=floors.devices(),
  )


@dataclasses.dataclass(frozen=True)
class _Save:
  """Seconds that one save held the loop, and slowed the steps after it."""

  blocked: float
  slowed: float


def _around(
  alone: Alone, saver: Checkpointer, number: int, usual: float
) -> _Save:
  """A save, and steps until it is done and a step more."""
  begin = time.perf_counter()
  saver.save(number, alone.state)
  blocked = time.perf_counter() - begin
  times = []
  while saver.saving:
    times.append(alone.step())
  times.append(alone.step())
  saver.wait()
  return _Save(blocked, sum(times) - usual * len(times))
