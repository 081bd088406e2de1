"""Kills a run at random moments and compares it with an uninterrupted one.

  python tools/chaos.py --config=mtv_tiny:tiny --kills=50 --output=runs/chaos

Trains OUTPUT/untouched, and OUTPUT/killed with SIGKILL at random moments while
it starts, restores, compiles, trains, saves and evaluates. The final train
state, metrics.jsonl (except speeds and goodput) and the evaluations' metrics
must be bit-identical. With --processes=2 one of two processes is killed, and
its peer must exit by itself; with --set=data.workers=2 also one of the worker
processes, and the run must exit by itself. OUTPUT may be in a bucket.

Exit status: 0 if both runs are equal, else 1.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mtv_jax.checkpoint.reading import load_tree, saved_steps
from mtv_jax.cli import arguments
from mtv_jax.cli.main import run_module
from mtv_jax.train.runtime.sessions import ALIVE, read_alive
from mtv_jax.train.runtime.supervisor import launch
from mtv_jax.train.spec import TrainState
from mtv_jax.train.workdir import CHECKPOINTS, local_folder
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.tree import flatten_with_names

MOMENTS = ("start", "restore", "compile", "train", "save", "evaluate")
# Lines of the log that precede two of them. The first is written once the
# train step is built; the restore follows.
_LINES = {"restore": b"] Encodings: ", "compile": b"] Compiling the step"}
# Prefixes of time-dependent metrics in metrics.jsonl.
TIMES = ("speed/", "goodput/")
# Exit timeout of surviving processes; longer than JAX's coordination service's.
_EXIT_SECONDS = 150
# Exit timeout of its worker processes, some of which may be importing.
_WORKER_EXIT_SECONDS = 30
# Orbax's marker of a complete checkpoint in a bucket.
_COMMITTED = "commit_success.txt"


def run(
  recipe: arguments.ConfigFlags,
  *,
  output: str,
  kills: int = 50,
  processes: int = 1,
  seed: int = 0,
) -> int:
  """Trains and compares both runs; returns the exit status.

  Args:
    output: folder or gs:// URL of the runs.
    kills: number of SIGKILLs.
    processes: processes per run; one is killed, its peers must exit.
    seed: seed of the random moments.
  """
  # Leaves the accelerator to the runs, which are separate processes.
  jax.config.update("jax_platforms", "cpu")
  equal = run_chaos(
    recipe.config,
    path_lib.as_path(output),
    assignments=recipe.set,
    kills=kills,
    processes=processes,
    seed=seed,
  )
  return int(not equal)


def log(line: str) -> None:
  """Prints a line of the result."""
  print(line, flush=True)


def run_chaos(
  config: str,
  output: pathlib.PurePath,
  *,
  assignments: Sequence[str],
  kills: int,
  processes: int,
  seed: int,
) -> bool:
  """Trains OUTPUT/untouched and OUTPUT/killed; returns whether they are equal.

  If the killed run finishes with kills left, it is compared, removed and
  restarted.
  """
  options = dict(config=config, assignments=assignments, processes=processes)
  run = Run(output / "untouched", **options)
  start = time.monotonic()
  codes = run.finish()
  if any(codes):
    log(f"The untouched run failed: exit codes {codes}, see {run.log}.")
    return False
  log(f"untouched: {time.monotonic() - start:.0f} s")
  killed, counts = Run(output / "killed", **options), collections.Counter()
  rng, differences, complete = random.Random(seed), [], 0
  while (number := sum(counts.values())) < kills:
    moment = killed.kill_at(rng.choice(MOMENTS), rng)
    if moment is None:  # Finished before the kill.
      differences += compare(run.workdir, killed.workdir)
      path_lib.remove_folder(killed.workdir)
      complete += 1
      continue
    counts[moment] += 1
    steps = saved_steps(killed.workdir)
    log(f"kill {number + 1}: {moment}; saved steps {steps}")
  codes = killed.finish()
  differences += compare(run.workdir, killed.workdir)
  if killed.orphans:
    differences.append(f"workers went on after {killed.orphans} kills")
  if killed.hangs:
    differences.append(f"{killed.hangs} processes did not exit by themselves")
  moments = ", ".join(f"{n} at {name}" for name, n in sorted(counts.items()))
  log(
    f"{number} kills ({moments}) of {complete + 1} runs to the end; exit codes"
    f" {codes}"
  )
  log("\n".join(differences) or "State, metrics and evaluations are equal.")
  return not differences and not any(codes)


class Run:
  """A run of a config in a folder or a bucket, in one or more processes."""

  def __init__(
    self,
    workdir: pathlib.PurePath,
    *,
    config: str,
    assignments: Sequence[str] = (),
    processes: int = 1,
  ):
    self.workdir = workdir
    # Local files of a run in a bucket, before their upload.
    self.folder = local_folder(workdir)
    self.log = self.folder.with_suffix(".log")
    self._config, self._assignments = config, [*assignments]
    self._processes = processes
    self.orphans = 0  # Kills after which a worker process went on.
    self.hangs = 0  # Processes that did not exit by themselves.
    if processes > 1:
      self._assignments.append("watchdog.peer_seconds=10")

  def launch(self) -> list[subprocess.Popen]:
    """Starts the processes."""
    return launch(
      self._config,
      self.workdir,
      self._assignments,
      log=self.log,
      processes=self._processes,
    )

  def finish(self) -> list[int]:
    """Trains to the end; returns the exit codes."""
    return [process.wait() for process in self.launch()]

  def kill_at(self, moment: str, rng: random.Random) -> str | None:
    """Starts the run and kills one process; returns None if it ended first."""
    for folder in {self.workdir, self.folder}:
      with contextlib.suppress(OSError):
        path_lib.remove(folder / ALIVE)
    log_start = self.log.stat().st_size if self.log.exists() else 0
    running = self.launch()
    delay = rng.uniform(0, 15) if moment == "start" else rng.uniform(0, 0.3)
    # Lets some steps pass before the kill, so that runs make progress.
    steps = rng.randint(1, 12)
    start, first = time.monotonic(), None
    while all(p.poll() is None for p in running):
      alive = read_alive(self.folder) or {}
      if first is None and alive.get("activity") == "train":
        first = alive["step"]
      if moment == "start":
        due = time.monotonic() - start > delay
      elif moment in _LINES:
        due = _LINES[moment] in self.log.read_bytes()[log_start:]
      else:
        due = self.logged_steps(first) >= steps and (
          moment == "train"
          or (moment == "save" and self.is_saving())
          or (moment == "evaluate" and "evaluate" in str(alive.get("activity")))
        )
      if due:
        if moment != "start":
          time.sleep(delay)
        break
      time.sleep(0.005)
    # Processes of a finished run don't exit at the same moment.
    ended = any(p.poll() == 0 for p in running)
    if not ended:
      pids = [process.pid for process in running]
      workers = [pid for parent in pids for pid in find_workers(parent)]
      victim = rng.choice(rng.choice([pids, workers or pids]))
      if victim in workers:
        moment = f"{moment} of a worker"
      with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    for process in running:
      try:
        process.wait(timeout=_EXIT_SECONDS)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        self.hangs += 1
    if ended:
      return None
    end = time.monotonic() + _WORKER_EXIT_SECONDS
    while any(map(_is_running, workers)) and time.monotonic() < end:
      time.sleep(0.1)
    self.orphans += any(map(_is_running, workers))
    return moment

  def logged_steps(self, first: int | None) -> int:
    """Steps in metrics.jsonl since this start."""
    if first is None:
      return 0
    rows = read_rows(self.folder)
    return int(rows[-1]["step"]) - first if rows else 0

  def is_saving(self) -> bool:
    """Whether a checkpoint is being written."""
    folder = self.workdir / CHECKPOINTS
    names = path_lib.list_folder(folder)
    if path_lib.is_remote(folder):
      return any(not path_lib.is_file(folder / n / _COMMITTED) for n in names)
    return any("tmp" in name for name in names)


def _is_running(pid: int) -> bool:
  return pathlib.Path(f"/proc/{pid}").exists()


def find_workers(pid: int) -> list[int]:
  """Worker processes of a process, by Linux's /proc."""
  with contextlib.suppress(OSError):
    files = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(x) for file in files for x in file.read_text().split()]
    commands = [pathlib.Path(f"/proc/{c}/cmdline") for c in children]
    return [
      child
      for child, command in zip(children, commands, strict=True)
      if b"spawn_main" in command.read_bytes()
    ]
  return []


def read_rows(workdir: pathlib.PurePath) -> list[dict[str, Any]]:
  """Complete lines of metrics.jsonl, without time-dependent metrics."""
  try:
    text = path_lib.read_bytes(workdir / "metrics.jsonl").decode()
  except OSError:
    return []
  rows = [json.loads(line) for line in text.split("\n")[:-1]]
  return [
    {k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows
  ]


def read_evals(workdir: pathlib.PurePath) -> dict[str, dict[str, Any]]:
  """Metrics in a run's evaluation files, without times."""
  folder, metrics = workdir / "evals", {}
  for name in path_lib.list_folder(folder):
    if name.endswith(".json"):
      evals = json.loads(path_lib.read_bytes(folder / name))["evals"]
      metrics[name] = {k: v.get("metrics") for k, v in evals.items()}
  return metrics


def compare(expected: pathlib.PurePath, actual: pathlib.PurePath) -> list[str]:
  """Lists the differences of two runs, one per line."""
  step = max(saved_steps(expected))
  differences = []
  for part in (field.name for field in dataclasses.fields(TrainState)):
    trees = []
    for workdir in (expected, actual):
      try:
        tree = load_tree(workdir, step=step, part=part)
      except ValueError:  # The checkpoint lacks this part.
        tree = {}
      trees.append(dict(flatten_with_names(tree)))
    if trees[0].keys() != trees[1].keys():
      differences.append(f"{part}: other names")
      continue
    differences += [
      f"{part}/{name} differs"
      for name, value in trees[0].items()
      if np.asarray(value).tobytes() != np.asarray(trees[1][name]).tobytes()
    ]
  rows = [read_rows(workdir) for workdir in (expected, actual)]
  if difference := first_difference(*rows):
    differences.append(f"metrics.jsonl: {difference}")
  evals = [read_evals(workdir) for workdir in (expected, actual)]
  differences += [
    f"evals/{name} differs"
    for name in sorted({*evals[0], *evals[1]})
    if evals[0].get(name) != evals[1].get(name)
  ]
  return differences


def first_difference(expected: list[dict], actual: list[dict]) -> str:
  """Describes the first rows that differ in values or key order, or ""."""
  for old, new in zip(expected, actual, strict=False):
    if old != new:
      keys = [k for k in {*old, *new} if old.get(k) != new.get(k)]
      return f"step {old['step']}: {sorted(keys)[:8]}"
    # Compares text because dict equality ignores key order.
    if json.dumps(old) != json.dumps(new):
      return f"step {old['step']}: other order of keys"
  if len(expected) != len(actual):
    return f"{len(expected)} rows and {len(actual)}"
  return ""


if __name__ == "__main__":
  sys.exit(run_module("chaos", sys.modules[__name__]))
