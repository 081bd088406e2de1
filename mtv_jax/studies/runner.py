"""Runs a study: `study.json`, training processes with resume, the table.

Any number of runners may share a study's folder. A lease per run and a lock on
its folder prevent two runners from training the same run. Results don't depend
on the runners: every start of a run uses the same config and overrides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtv_jax.config import options
from mtv_jax.config.options import PositiveInt
from mtv_jax.config.overrides import describe_difference
from mtv_jax.perf.bench.step import matmul_peak
from mtv_jax.report.run_folders import read_metrics
from mtv_jax.studies.arms import KINDS
from mtv_jax.studies.expand import (
  FORMAT,
  MATCHES,
  Study,
  StudyRun,
  code_version,
)
from mtv_jax.train import workdir
from mtv_jax.train.runtime import preemption
from mtv_jax.train.runtime.supervisor import launch
from mtv_jax.utils import atomic, progress
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  ConfigError,
  InputError,
  UserError,
  check_choice,
)
from mtv_jax.utils.leases import open_leases
from mtv_jax.utils.text import align_columns, first_lines, format_duration

STUDY, RUNS, LOGS, COMPILED = "study.json", "runs", "logs", "compiled"
# Folder of `mtv-jax evaluate --study`.
EVALUATIONS = "evaluations"
_POLL_SECONDS = 1.0
_MAX_DIFFERENCES = 8

LogFn = Callable[[str], None]


@dataclasses.dataclass
class StudyStatus:
  """Outcome of `run_study`, by run name."""

  finished: list[str] = dataclasses.field(default_factory=list)
  failed: dict[str, str] = dataclasses.field(default_factory=dict)  # reasons
  leased: dict[str, str] = dataclasses.field(default_factory=dict)  # holders


def check_index(index: str | None) -> None:
  """Raises ConfigError unless `--index` is `I`, `I/N` or absent."""
  if index is not None and not re.fullmatch(r"\d+(/[1-9]\d*)?", index):
    raise ConfigError(f"--index={index}: write I from 0, or I/N.")


def select_runs(runs: Sequence[StudyRun], index: str | None) -> list[StudyRun]:
  """The runs of `--index=I` (from 0) or `I/N` (every N-th from I); else all."""
  check_index(index)
  if index is None:
    return list(runs)
  first, count = (int(n or 0) for n in index.partition("/")[::2])
  limit = count or len(runs)
  if first >= limit:
    raise ConfigError(
      f"--index={index}: expected 0 to {limit - 1}; the study has {len(runs)} "
      "runs."
    )
  return list(runs[first::count] if count else runs[first : first + 1])


def read(folder: pathlib.Path) -> Study:
  """Reads and checks `study.json` of a folder."""
  path = folder / STUDY
  try:
    fields = json.loads(path_lib.read_regular(path, limit=path_lib.MAX_JSON))
  except FileNotFoundError:
    raise InputError(f"{folder} has no {STUDY}: it is not a study.") from None
  except (ValueError, RecursionError) as error:
    raise InputError(
      f"{path} is not JSON ({error}). Remove it: the study's command "
      "writes it again."
    ) from None
  value = fields.get("format") if isinstance(fields, dict) else None
  if value != FORMAT:
    raise InputError(f"{path} has format {value}; this version reads {FORMAT}.")
  try:
    _check_fields(fields)
    return Study.from_dict(fields)
  except ConfigError as error:
    raise InputError(f"{path}: {error}") from None
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise InputError(f"{path} is not a study: {error!r}.") from None


def _check_fields(fields: Mapping[str, Any]) -> None:
  """Raises ConfigError for invalid values of `study.json`."""
  check_choice("kind", fields["kind"], KINDS)
  check_choice("match", fields["match"], MATCHES)
  for name, annotation in dict(config=str, baseline=str, budget=float).items():
    options.check_value(fields[name], annotation, name)
  annotations = dict(name=str, arm=str, seed=int, steps=PositiveInt)
  annotations |= dict(flops=float | None, settings=dict)
  runs = fields["runs"]
  for i, run in enumerate(runs):
    for name, annotation in annotations.items():
      options.check_value(run[name], annotation, f"runs[{i}].{name}")
    if run["settings"].get("seed", run["seed"]) != run["seed"]:
      raise ConfigError(f"runs[{i}].seed is not that of its settings.")
  arms = dict.fromkeys(run["arm"] for run in runs)
  check_choice("baseline", fields["baseline"], arms)
  options.check_value(fields.get("family"), dict | None, "family")
  for arm in itertools.chain(
    *(fields.get("family") or {}).get("comparisons", ())
  ):
    check_choice("an arm of family.comparisons", arm, arms)
  for what, values in (
    ("name", [run["name"] for run in runs]),
    ("arm and seed", [(run["arm"], run["seed"]) for run in runs]),
  ):
    if len({*values}) < len(values):
      raise ConfigError(f"two runs have the same {what}.")


def write(
  folder: pathlib.Path, study: Study, *, keeps_family: bool = False
) -> None:
  """Writes `study.json`; an existing study may only be extended.

  The family of tests is fixed by the first command: a different one is an
  error, unless the study `keeps_family`. It records how many runs the folder
  has then.
  """
  if (folder / "config.json").exists():
    raise ConfigError(
      f"--output={folder} is the folder of a run or a model. Choose another"
      " one."
    )
  folder.mkdir(parents=True, exist_ok=True)
  if study.family:
    started = sum(1 for _ in (folder / RUNS).glob("*/config.json"))
    family = dataclasses.replace(study.family, num_started_runs=started)
    study = dataclasses.replace(study, family=family)
  data = _encode(study)
  if atomic.write_if_absent(folder / STUDY, data) == data:
    return
  old = read(folder)
  differences = [
    f"{name}: {getattr(old, name)!r} -> {getattr(study, name)!r}"
    for name in ("kind", "match", "baseline")
    if getattr(old, name) != getattr(study, name)
  ]
  settings = {run.name: run.settings for run in study.runs}
  for run in old.runs:
    lines = ["not among the runs of this command"]
    if run.name in settings:
      lines = describe_difference(run.settings, settings[run.name])
    differences += [f"{run.name}: {line}" for line in lines]
  if old.family and study.family and not keeps_family:
    pairs, arms = old.family.comparisons, {*old.family.seeds}
    new_pairs = [p for p in study.family.comparisons if {*p} <= arms]
    if {*new_pairs} != {*pairs}:
      differences.append(f"family: {pairs} -> {tuple(new_pairs)}")
  is_recounted = old.counted_by != study.counted_by and study.match == "flops"
  if differences and is_recounted:
    differences.insert(0, "FLOPs: counted by another version of the package")
  if differences:
    raise ConfigError(
      f"{folder} has a study with different settings; results of both would be "
      "mixed. Choose another --output, or repeat the first command. If nothing "
      f"is trained yet, remove {folder / STUDY}. What differs:\n"
      f"{first_lines(differences, _MAX_DIFFERENCES)}"
    )
  kept_study = dataclasses.replace(study, family=old.family)
  atomic.write(folder / STUDY, _encode(kept_study))


def _encode(study: Study) -> bytes:
  return (json.dumps(study.to_dict(), indent=1) + "\n").encode()


def is_finished(folder: pathlib.Path, run: StudyRun) -> bool:
  """Whether a run has completed its last checkpoint and evaluations.

  Raises InputError if its config differs from the study's settings.
  """
  path = folder / RUNS / run.name
  config = path_lib.read_json(path / "config.json")
  if config is None:  # Not started, or killed while writing its config.
    return False
  if config != run.settings:
    lines = describe_difference(run.settings, config)
    raise InputError(
      f"{path} is a run with other settings than the study's: move it away. "
      f"What differs:\n{first_lines(lines, _MAX_DIFFERENCES)}"
    )
  results = [
    path / "evals" / f"{name}_{run.steps}.json" for name in config["evals"]
  ]
  # The last checkpoint is saved after the last evaluation.
  return all(
    p.exists() for p in (*results, path / "checkpoints" / str(run.steps))
  )


def finished_runs(folder: pathlib.Path) -> list[StudyRun]:
  """The finished runs of a study, in its order."""
  return [run for run in read(folder).runs if is_finished(folder, run)]


def run_study(
  folder: pathlib.Path,
  study: Study,
  *,
  index: str | None = None,
  log_fn: LogFn = print,
) -> StudyStatus:
  """Trains the unfinished runs of a study sequentially.

  Raises Preempted after SIGTERM, once the current run has saved a checkpoint.
  """
  status = StudyStatus()
  selected = select_runs(study.runs, index)
  leases = open_leases(folder / RUNS)
  (folder / RUNS).mkdir(exist_ok=True)
  (folder / LOGS).mkdir(exist_ok=True)
  for number, run in enumerate(selected, 1):
    if is_finished(folder, run):
      status.finished.append(run.name)
      continue
    where = f"{run.name} ({number} of {len(selected)})"
    with leases.acquire(run.name) as acquired:
      if not acquired:
        status.leased[run.name] = f"{leases.holder(run.name)}"
        log_fn(f"{where}: trained by {status.leased[run.name]}")
        continue
      # Another runner may have finished it in the meantime.
      if not is_finished(folder, run):
        log = folder / LOGS / f"{run.name}.log"
        log_fn(f"{where}: {run.steps} steps, log in {log}")
        start = time.monotonic()
        _wait_for_lock(folder / RUNS / run.name, log_fn)
        with progress.activity(where):
          reason = _train(folder, study, run, log)
        if reason is None and not is_finished(folder, run):
          reason = _describe_unfinished(folder / RUNS / run.name, run.steps)
        if reason is not None:
          status.failed[run.name] = reason
          log_fn(f"{where} FAILED: {reason}")
          continue
        log_fn(f"{where}: finished in {time.monotonic() - start:.0f} s")
    status.finished.append(run.name)
  # Other runners may have finished their runs in the meantime: the last runner
  # must see every run as finished.
  for run in selected:
    if run.name in status.leased and is_finished(folder, run):
      del status.leased[run.name]
      status.finished.append(run.name)
  return status


def _describe_unfinished(path: pathlib.Path, steps: int) -> str:
  """Why a run that exited with 0 has not finished."""
  end = path_lib.read_json(path / workdir.END, tolerant=True)
  if isinstance(end, dict):
    return (
      f"stopped by the bound of an evaluation: {end.get('reason')}; remove the "
      "arm, or study it without the bound"
    )
  return (
    "it exited without its last evaluations; to repeat them from the "
    f"previous checkpoint, remove {path / workdir.CHECKPOINTS / str(steps)}"
  )


def _wait_for_lock(path: pathlib.Path, log_fn: LogFn) -> None:
  """Waits for a training process that outlived its killed runner."""
  is_waiting = False
  while True:
    try:
      with workdir.lock_workdir(path):
        return
    except ConfigError as error:
      if not is_waiting:
        log_fn(f"Waiting: {error}")
      is_waiting = True
      time.sleep(_POLL_SECONDS)


def _train(
  folder: pathlib.Path, study: Study, run: StudyRun, log: pathlib.Path
) -> str | None:
  """Trains in a new process; returns the reason if it failed, else None."""
  log_size = log.stat().st_size if log.exists() else 0
  # Seeds of an arm have equal steps. As in a run, JAX's option has priority.
  has_cache = jax.config.jax_compilation_cache_dir
  (process,) = launch(
    study.config,
    folder / RUNS / run.name,
    run.overrides,
    log=log,
    compile_cache="auto" if has_cache else folder / COMPILED,
  )
  with _forward_sigterm(process) as notice:
    try:
      exit_code = process.wait()
    except BaseException:
      # On Ctrl-C the terminal signals the process too: wait for its exit.
      process.wait()
      raise
  if exit_code == preemption.EXIT_CODE or notice.received:
    raise preemption.Preempted(
      f"received SIGTERM in run {run.name}, see {log}. The same command "
      "resumes the study."
    )
  if exit_code == 0:
    return None
  with log.open("rb") as stream:
    stream.seek(log_size)
    lines = stream.read().decode(errors="replace").strip().splitlines()
  last_line = lines[-1] if lines else "no output"
  status = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
  return f"{status}, last line of {log}: {last_line}"


@contextlib.contextmanager
def _forward_sigterm(
  process: subprocess.Popen,
) -> Iterator[preemption.Notice]:
  """Forwards SIGTERM to a process instead of exiting."""
  notice = preemption.Notice()
  if threading.current_thread() is not threading.main_thread():
    yield notice
    return

  def forward(*_):
    notice.signal_number = signal.SIGTERM
    process.send_signal(signal.SIGTERM)

  old_handler = signal.signal(signal.SIGTERM, forward)
  try:
    yield notice
  finally:
    signal.signal(signal.SIGTERM, old_handler)


def known_costs(folder: pathlib.Path) -> Mapping[str, float]:
  """FLOPs stored by a study in the folder, if its `code_version` is equal."""
  try:
    study = read(folder)
  except UserError:
    return {}
  return study.costs if study.counted_by == code_version() else {}


def format_runs(
  folder: pathlib.Path, study: Study, *, measure: bool = True
) -> str:
  """A line per run, the total, and the source of the time estimates."""
  is_done = {run.name: is_finished(folder, run) for run in study.runs}
  rate, source = _measure_rate(folder, study.runs, measure)
  rows = [["", "run", "steps", "images", "GFLOP/image", "PFLOP", "time", ""]]
  seconds = 0.0
  for number, run in enumerate(study.runs):
    estimate = run.flops / rate if run.flops and rate else float("nan")
    seconds += 0.0 if is_done[run.name] else estimate
    rows.append(
      [
        str(number),
        run.name,
        f"{run.steps:,}",
        f"{run.images:,}",
        f"{(run.flops or np.nan) / run.images / 1e9:.3f}",
        f"{(run.flops or np.nan) / 1e15:.3g}",
        format_duration(estimate) if rate else "",
        "finished" if is_done[run.name] else "",
      ]
    )
  num_left = len(study.runs) - sum(is_done.values())
  table = "\n".join(align_columns(rows, left=(1, len(rows[0]) - 1)))
  summary = f"{table}\n{num_left} of {len(study.runs)} runs to train"
  if not rate:
    return summary
  return (
    f"{summary}, {format_duration(seconds)} {source}, without compilation and"
    " evaluations"
  )


def _measure_rate(
  folder: pathlib.Path, runs: Sequence[StudyRun], measure: bool
) -> tuple[float | None, str]:
  """FLOP/s and a description of their source.

  The median over the study's runs; without runs, if `measure`, the rate of a
  matmul on this process's device, an upper bound.
  """
  rates = []
  for run in runs:
    # If a crash damaged the log, resuming the run repairs it.
    with contextlib.suppress(UserError):
      series = read_metrics(folder / RUNS / run.name)
      speeds = [x for _, x in series.get("speed/images_per_second", ()) if x]
      if speeds and run.flops:
        rates.append(run.flops / run.images * np.median(speeds))
  if rates:
    return float(np.median(rates)), "at the rate of the runs so far"
  if not measure:
    return None, ""
  rate, device = matmul_peak("float32") / jax.device_count(), jax.devices()[0]
  text = f"at {rate / 1e9:,.0f} GFLOP/s of a matrix product"
  return rate, f"at least, {text} on one {device.device_kind}"
