"""Folders of runs: config, metrics, evaluations, sheets, gradients."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from mtv_jax.evals.core import results
from mtv_jax.evals.core.results import Outcome
from mtv_jax.utils.curves import read_metrics, read_rows
from mtv_jax.utils.errors import MissingFileError

_EVALUATION = re.compile(r"(.+)_(\d+)\.json")


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """A run's folder, read."""

  name: str  # distinct in a report
  arm: str  # the setting that its seeds share
  seed: int
  folder: pathlib.Path
  config: dict[str, Any]  # resolved
  # (step, value) by metric, see `curves.read_metrics`.
  series: dict[str, list[tuple[int, float]]]
  outcome: Outcome  # the last result of each evaluation
  # Files of each evaluation's last sheets, by (evaluation, sheet).
  sheets: dict[tuple[str, str], pathlib.Path]
  interference: list[dict[str, Any]]  # measurements, see docs/training.md
  command: str  # "" where it is not known

  @property
  def step(self) -> int:
    """The last logged step."""
    return max((p[-1][0] for p in self.series.values() if p), default=0)


def read_run(
  folder: str | os.PathLike,
  *,
  name: str = "",
  arm: str = "",
  command: str = "",
) -> RunFolder:
  """Reads the folder of a run, finished or not.

  Raises:
    MissingFileError: if it has no config.
    InputError: for a file that can't be read.
  """
  folder = pathlib.Path(folder)
  path = folder / "config.json"
  if not path.is_file():
    raise MissingFileError(
      f"{path} does not exist; expected the folder of a run"
    )
  config = json.loads(path.read_text(encoding="utf-8"))
  name = name or folder.resolve().name
  files = last_evaluations(folder)
  has_metrics = (folder / "metrics.jsonl").is_file()
  stored = folder / "command.txt"
  if not command and stored.is_file():
    command = stored.read_text(encoding="utf-8").strip()
  return RunFolder(
    name=name,
    arm=arm or name,
    seed=int(config.get("seed", 0)),
    folder=folder,
    config=config,
    series=read_metrics(folder) if has_metrics else {},
    outcome=_read_outcome(name, list(files.values())),
    sheets={
      (evaluation, sheet.stem): sheet
      for evaluation, file in files.items()
      for sheet in sorted(file.with_suffix("").glob("*.png"))
    },
    interference=_read_interference(folder / "interference.jsonl"),
    command=command,
  )


def last_evaluations(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The last file `evals/NAME_STEP.json` of each evaluation."""
  found: dict[str, tuple[int, pathlib.Path]] = {}
  for path in sorted((folder / "evals").glob("*.json")):
    match = _EVALUATION.fullmatch(path.name)
    if match and int(match[2]) >= found.get(match[1], (-1,))[0]:
      found[match[1]] = int(match[2]), path
  return {name: path for name, (_, path) in found.items()}


def _read_outcome(name: str, files: Sequence[pathlib.Path]) -> Outcome:
  """One outcome with the results of several files."""
  outcomes = [outcome for file in files for outcome in results.read(file)]
  if not outcomes:
    return Outcome(name=name, encoder="", weights="")
  merged = {k: v for o in outcomes for k, v in o.results.items()}
  return dataclasses.replace(outcomes[-1], name=name, results=merged)


def _read_interference(path: pathlib.Path) -> list[dict[str, Any]]:
  """Measurements in order, the last one of each step; none if missing."""
  rows = read_rows(path) if path.is_file() else []
  by_step = {row["step"]: row for row in rows}
  return [by_step[step] for step in sorted(by_step)]
