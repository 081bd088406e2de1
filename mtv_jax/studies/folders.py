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
from mtv_jax.utils.errors import InputError, MissingFileError

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
  files: dict[str, pathlib.Path]  # their JSON, by evaluation
  # Files of their sheets, by (evaluation, sheet).
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
  step: int | None = None,
) -> RunFolder:
  """Reads the folder of a run, finished or not.

  Args:
    folder: of the run.
    name: by default the folder's.
    arm: by default the name.
    step: of the evaluations; by default the last one of each.

  Raises:
    MissingFileError: if it has no config.
    InputError: for a file that can't be read.
  """
  folder = pathlib.Path(folder)
  config = read_config(folder)
  name = name or folder.resolve().name
  files = find_evaluations(folder, step)
  has_metrics = (folder / "metrics.jsonl").is_file()
  command = folder / "command.txt"
  return RunFolder(
    name=name,
    arm=arm or name,
    seed=int(config.get("seed") or 0),
    folder=folder,
    config=config,
    series=read_metrics(folder) if has_metrics else {},
    outcome=_read_outcome(name, list(files.values())),
    files=files,
    sheets={
      (evaluation, sheet.stem): sheet
      for evaluation, file in files.items()
      for sheet in sorted(file.with_suffix("").glob("*.png"))
    },
    interference=_read_interference(folder / "interference.jsonl"),
    command=command.read_text("utf-8").strip() if command.is_file() else "",
  )


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The resolved config of a run.

  Raises:
    MissingFileError: if there is none.
    InputError: if a crash has truncated it, or it is not a config.
  """
  path = folder / "config.json"
  if not path.is_file():
    raise MissingFileError(
      f"{path} does not exist; expected the folder of a run"
    )
  try:
    config = json.loads(path.read_bytes())
  except ValueError as error:
    raise InputError(
      f"{path} is not JSON ({error}). Resume the run, which writes it again."
    ) from None
  if not isinstance(config, dict):
    raise InputError(f"{path} is not the config of a run.")
  return config


def find_evaluations(
  folder: pathlib.Path, step: int | None = None
) -> dict[str, pathlib.Path]:
  """The file `evals/NAME_STEP.json` of each evaluation, by default the last."""
  found: dict[str, tuple[int, pathlib.Path]] = {}
  for path in sorted((folder / "evals").glob("*.json")):
    match = _EVALUATION.fullmatch(path.name)
    if not match or step not in (None, int(match[2])):
      continue
    if int(match[2]) >= found.get(match[1], (-1,))[0]:
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
