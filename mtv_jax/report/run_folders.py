"""Reads run folders: config, metrics, evaluations, image grids, gradients."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mtv_jax.config.options import check_value
from mtv_jax.evals.core import results
from mtv_jax.evals.core.results import Outcome
from mtv_jax.report.charts import is_drawable
from mtv_jax.train.runtime.sessions import read_sessions
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError, InputError, MissingFileError
from mtv_jax.utils.text import format_duration, format_short, list_first

T = TypeVar("T")

SAMPLES = "samples/samples.json"
# A run's folder of STEP.json files, written by `mtv-jax interference`.
INTERFERENCE = "interference"
INTERFERENCE_FORMAT = "mtv_jax interference 1"
# What reports read of such a file.
_MEASURED = {"format", "step", "objectives", "batches", "reliability"}
_EVALUATION = re.compile(r"(.+)_(\d+)\.json")
# Config fields that reports read.
_FIELDS = dict(
  seed=int | None,
  batch_size=int | None,
  total_steps=int | None,
  objectives=dict | None,
  model=dict | None,
  evals=dict | None,
)
_MAX_SOURCES = 3  # Data sets in a sentence.
_MAX_LOG_BYTES = 2 << 30  # Bytes of JSON Lines.
# Raised by `json` for invalid or too deeply nested text.
_JSON_ERRORS = (ValueError, RecursionError)
# (step, value) pairs by metric.
MetricHistory = dict[str, list[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class RunRecord:
  """The contents of a run's folder."""

  name: str  # unique in a report
  arm: str  # the setting, shared by its seeds
  seed: int
  folder: pathlib.Path
  config: dict[str, Any]  # resolved
  series: MetricHistory  # see `read_metrics`
  outcome: Outcome  # the last result of each evaluation, with resamples
  files: dict[str, pathlib.Path]  # JSON of the results, by evaluation
  # Sheets of the results, by (evaluation, sheet).
  sheets: dict[tuple[str, str], pathlib.Path]
  interference: list[dict[str, Any]]  # measurements, see docs/training.md
  # Measurements of `mtv-jax interference`, in step order.
  checkpoint_interference: list[dict[str, Any]]
  command: str  # "" if unknown
  sessions: list[dict[str, Any]]  # of run.json, oldest first
  samples: dict[str, Any]  # of samples/samples.json; empty if missing

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
  extra_results: pathlib.Path | None = None,
) -> RunRecord:
  """Reads the folder of a run, finished or not.

  `step` selects the evaluations, by default the last of each. `extra_results`
  is the folder of a `ResultStore` with evaluations that the run's folder lacks.
  """
  folder = pathlib.Path(folder)
  config = read_config(folder)
  name = name or folder.resolve().name
  files = {
    evaluation: by_step[max(by_step) if step is None else step]
    for evaluation, by_step in list_evaluations(folder).items()
    if step is None or step in by_step
  }
  for file in sorted(extra_results.glob("*.json")) if extra_results else ():
    if results.read(file)[0].name == name:  # "a+b" and "a-b" share a folder.
      files.setdefault(file.stem, file)
  order = [*(config.get("evals") or {})]
  files = {n: files[n] for n in dict.fromkeys((*order, *files)) if n in files}
  command, text = folder / "command.txt", ""
  samples = path_lib.read_json(folder / SAMPLES, tolerant=True)
  if command.is_file():
    data = path_lib.read_regular(command, limit=path_lib.MAX_JSON)
    text = data.decode(errors="replace")
  return RunRecord(
    name=name,
    arm=arm or name,
    seed=config.get("seed") or 0,
    folder=folder,
    config=config,
    series=read_metrics(folder),
    outcome=_read_outcome(name, list(files.values())),
    files=files,
    sheets={
      (evaluation, sheet.stem): sheet
      for evaluation, file in files.items()
      for sheet in sorted(file.with_suffix("").glob("*.png"))
      if sheet.is_file()
    },
    interference=_read_interference(folder / "interference.jsonl"),
    checkpoint_interference=read_checkpoint_interference(folder),
    command=text.strip(),
    sessions=read_sessions(folder),
    samples=samples if _is_samples(samples) else {},
  )


def _is_samples(content: Any) -> bool:
  if not isinstance(content, dict):
    return False
  captions, labelled = (content.get(k, []) for k in ("captions", "labelled"))
  return isinstance(labelled, list | dict) and (
    isinstance(captions, list) and all(isinstance(c, str) for c in captions)
  )


def name_arms(runs: Sequence[RunRecord]) -> list[RunRecord]:
  """Groups runs whose configs differ only in the seed into one arm.

  The arm's name is their common stem, such as `a` for `a_0` and `a_1`, else the
  first run's name. Runs with equal seeds stay separate.
  """
  groups: dict[str, list[RunRecord]] = {}
  for run in runs:
    config = json.dumps(run.config | {"seed": None}, sort_keys=True)
    groups.setdefault(config, []).append(run)
  arms: dict[str, str] = {}
  for members in groups.values():
    names = [run.name for run in members]
    if len({run.seed for run in members}) < len(members):
      arms |= dict(zip(names, names, strict=True))
      continue
    stems = {re.sub(r"[-_.]?s?\d+$", "", name) for name in names}
    stem = stems.pop() if len(stems) == 1 else ""
    is_free = len(names) > 1 and stem and stem not in arms.values()
    arms |= dict.fromkeys(names, stem if is_free else names[0])
  return [dataclasses.replace(run, arm=arms[run.name]) for run in runs]


def group_by_arm(runs: Iterable[T]) -> dict[str, list[T]]:
  """Groups runs, or plans of runs, by `arm`, in order of appearance."""
  arms = collections.defaultdict(list)
  for run in runs:
    arms[run.arm].append(run)
  return dict(arms)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """Reads and checks the resolved config of a run."""
  path = folder / "config.json"
  if not path.is_file():
    raise MissingFileError(
      f"{path} does not exist; expected the folder of a run"
    )
  try:
    config = json.loads(path_lib.read_regular(path, limit=path_lib.MAX_JSON))
  except _JSON_ERRORS as error:
    raise InputError(
      f"{path} is not JSON ({error}). Resume the run, which writes it again."
    ) from None
  if not isinstance(config, dict):
    raise InputError(f"{path} is not the config of a run.")
  try:
    for name, annotation in _FIELDS.items():
      check_value(config.get(name), annotation, name)
  except ConfigError as error:
    raise InputError(f"{path} is not the config of a run: {error}") from None
  return config


def read_metrics(folder: pathlib.Path) -> MetricHistory:
  """The drawable metrics of `metrics.jsonl` by name; empty without the file."""
  series = collections.defaultdict(dict)
  path = folder / "metrics.jsonl"
  for row in read_rows(path) if path.is_file() else ():
    step = row.pop("step")
    for name, value in row.items():
      if isinstance(value, int | float) and is_drawable(value):
        # A resumed run logs some steps twice; keep the last value.
        series[name][step] = float(value)
  return {name: sorted(points.items()) for name, points in series.items()}


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads JSON Lines of a run; skips a last line truncated by a crash."""
  data = path_lib.read_regular(path, limit=_MAX_LOG_BYTES)
  lines = data.decode(errors="replace").splitlines()
  rows = []
  for i, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      step = row.get("step") if isinstance(row, dict) else None
      is_row = isinstance(step, int) and 0 <= step < 2**63
    except _JSON_ERRORS:
      is_row = False
    if is_row:
      rows.append(row)
    elif i < len(lines):
      raise InputError(
        f"{path}: line {i} is not a row of a run's log: {line[:60]!r}. Remove "
        "the line."
      )
  return rows


def list_evaluations(
  folder: pathlib.Path,
) -> dict[str, dict[int, pathlib.Path]]:
  """Files `evals/NAME_STEP.json` by evaluation and step, in step order."""
  by_name: dict[str, dict[int, pathlib.Path]] = {}
  for path in sorted((folder / "evals").glob("*.json")):
    if match := _EVALUATION.fullmatch(path.name):
      by_name.setdefault(match[1], {})[int(match[2])] = path
  return {name: dict(sorted(files.items())) for name, files in by_name.items()}


def read_outcomes(path: pathlib.Path) -> list[Outcome]:
  """Reads the outcomes of an evaluation's JSON, with their resamples."""
  resamples = results.read_resamples(path)
  return [
    dataclasses.replace(
      outcome,
      results={
        name: dataclasses.replace(result, resamples=resamples)
        for name, result in outcome.results.items()
      },
    )
    for outcome in results.read(path)
  ]


def read_image(path: pathlib.Path) -> np.ndarray:
  """Reads a run's image, uint8 [H, W, 3]."""
  try:
    with Image.open(path) as file:
      return np.asarray(file.convert("RGB"))
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise InputError(
      f"{path} is damaged or not an image ({error}). Remove it."
    ) from None


def _read_outcome(name: str, files: Sequence[pathlib.Path]) -> Outcome:
  """Merges the results of several files into one outcome."""
  outcomes = [outcome for file in files for outcome in read_outcomes(file)]
  if not outcomes:
    return Outcome(name=name, encoder="", weights="")
  merged = {k: v for o in outcomes for k, v in o.results.items()}
  return dataclasses.replace(outcomes[0], name=name, results=merged)


def _read_interference(path: pathlib.Path) -> list[dict[str, Any]]:
  """Measurements in step order, the last of each; empty without the file."""
  rows = read_rows(path) if path.is_file() else []
  for row in rows:
    if not _is_measurement(row):
      raise InputError(
        f"{path}: the row of step {row['step']} is not a measurement of "
        "gradients. Remove it."
      )
  by_step = {row["step"]: row for row in rows}
  return [by_step[step] for step in sorted(by_step)]


def _is_measurement(row: dict[str, Any]) -> bool:
  """Whether a row has objectives O, blocks B, and arrays of matching shape."""
  try:
    names = [*row["objectives"], *row["blocks"]]
    if not all(isinstance(name, str) for name in names):
      return False
    o, b = len(row["objectives"]), len(row["blocks"])
    shapes = dict(norms=(o, b), cosines=(o, o, b), transfer=(o, o))
    return all(
      np.asarray(row[name], float).shape == shape
      for name, shape in shapes.items()
      if row.get(name) is not None
    )
  except (KeyError, TypeError, ValueError, OverflowError):
    return False


def read_checkpoint_interference(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the files `interference/STEP.json`, in step order.

  Raises InputError for a file of another format.
  """
  rows = []
  for path in (folder / INTERFERENCE).glob("*.json"):
    row = path_lib.read_json(path)
    is_valid = isinstance(row, dict) and row.keys() >= _MEASURED
    if not is_valid or row["format"] != INTERFERENCE_FORMAT:
      raise InputError(
        f"{path} is not a measurement of `mtv-jax interference`. Remove it, or "
        "measure again."
      )
    rows.append(row)
  return sorted(rows, key=lambda row: row["step"])


def read_facts(run: RunRecord, *, timed: bool = True) -> dict[str, str]:
  """Data, model, hardware, time, date, revision and seed; "" if unknown.

  Without `timed`, skips facts that depend on the machine.
  """
  session = run.sessions[-1] if run.sessions else {}
  facts = {"training data": _describe_data(run, session)}
  facts["labels"] = _describe_coverage(run.samples)
  facts["objectives"] = ", ".join(run.config.get("objectives") or ())
  facts["model"] = _describe_model(run.config, session)
  if timed:
    facts["hardware"] = _describe_hardware(session)
    facts["time"] = _describe_time(run, session)
    facts["date"] = _describe_dates(run.sessions)
    facts["revision"] = _describe_revision(session)
  return {**facts, "seed": str(run.seed)}


def _describe_data(run: RunRecord, session: Mapping[str, Any]) -> str:
  """Sources with their numbers of images, and images seen."""
  batch, steps = run.config.get("batch_size") or 0, run.step
  seen = f"{steps * batch:,} seen in {steps:,} steps of {batch:,}"
  if sources := session.get("data"):
    records = sum(s["records"] for s in sources)
    named = [f"{s['records']:,} in {s['name']}" for s in sources]
    seen += f" ({steps * batch / records:.2g} epochs)"
    return f"{records:,} images: {list_first(named, _MAX_SOURCES)}; {seen}"
  return seen


def _describe_coverage(samples: Mapping[str, Any]) -> str:
  """Share of labelled images in the first batch, by kind."""
  rows = samples.get("rows", 0)
  shares = [
    f"{kind} {100 * count / rows:.0f} %"
    for kind, count in samples.get("labelled", {}).items()
  ]
  return f"{', '.join(shares)} of the first {rows:,} images" if shares else ""


def _describe_model(
  config: Mapping[str, Any], session: Mapping[str, Any]
) -> str:
  model = config.get("model") or {}
  text = model.get("text") or {}
  name = f"ViT {model.get('variant', '')}".strip()
  name += f", {model['image_size']} pixels" if "image_size" in model else ""
  name += f", text tower {text['variant']}" if text.get("variant") else ""
  counts = session.get("parameters")
  if not counts:
    return name if model else ""
  parts = ", ".join(f"{k} {format_short(n)}" for k, n in counts.items())
  return f"{name}: {format_short(sum(counts.values()))} parameters ({parts})"


def _describe_hardware(session: Mapping[str, Any]) -> str:
  if not (kind := session.get("device_kind")):
    return ""
  name = f"{session['devices']:,} × {kind}"
  if kind.lower() == "cpu":
    name = f"CPU, {session.get('cores', session['devices'])} cores"
  processes = session["processes"]
  return name + f", {processes} processes" * (processes > 1)


def _describe_time(run: RunRecord, session: Mapping[str, Any]) -> str:
  """Wall time of all sessions, and device hours of training steps."""
  wall = datetime.timedelta()
  for entry in run.sessions:
    with contextlib.suppress(TypeError, ValueError):  # None, "unknown".
      times = entry.get("started"), entry.get("ended")
      start, end = map(datetime.datetime.fromisoformat, times)
      wall += end - start
  parts = [f"{format_duration(wall.total_seconds())} of wall time"] * bool(wall)
  hours = [v for _, v in run.series.get("speed/core_hours", ())][-1:]
  kind = str(session.get("device_kind", "")).lower()
  unit, devices = "chip-hours", session.get("devices", 1)
  if kind == "cpu":
    # Devices of a CPU share its cores.
    cores = session.get("cores", devices) * session["processes"]
    unit, hours = "core-hours", [h * cores / devices for h in hours]
  parts += [f"{h:.2g} {unit} of training steps" for h in hours]
  return ", ".join(parts)


def _describe_dates(sessions: Sequence[Mapping[str, Any]]) -> str:
  """Dates in UTC, to the minute; `read_sessions` returns ISO 8601."""
  times = [s.get(name) for s in sessions for name in ("started", "ended")]
  times = sorted(
    t[:16].replace("T", " ") for t in times if t and t != "unknown"
  )
  count = f", {len(sessions)} sessions" * (len(sessions) > 1)
  return f"{times[0]} to {times[-1]} UTC{count}" if times else ""


def _describe_revision(session: Mapping[str, Any]) -> str:
  if not (revision := session.get("revision")):
    return ""
  short = re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", revision)
  versions = session.get("packages") or {}
  named = [f"{k} {versions[k]}" for k in ("mtv_jax", "jax") if k in versions]
  digest = session.get("digest")
  return ", ".join([short, *named, *([f"code {digest}"] if digest else [])])
