"""Evaluations of several encoders, and the folder of their results."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax

from mtv_jax.encoder import baselines, loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals import run
from mtv_jax.evals.core import results
from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.report import report as report_lib
from mtv_jax.evals.report import sections
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.pages import write_pages

_WEIGHTS = re.compile(r"(.+)@(student|teacher|ema)")


class Request(NamedTuple):
  """An encoder that a command line requests."""

  path: str
  weights: str  # `student`, `teacher` or `ema`.
  name: str  # in tables


def parse_requests(
  encoders: Sequence[str], *, weights: str | None
) -> list[Request]:
  """Parses the values of `--encoder`: PATH or PATH@WEIGHTS, in order.

  The name of an encoder in tables is the last part of its path, or as many of
  the last parts as distinguish it from the others.

  Args:
    encoders: at least one.
    weights: for those without @WEIGHTS; None for each one's default.

  Raises:
    ConfigError: for the same one twice.
  """
  split = []
  for given in encoders:
    match = _WEIGHTS.fullmatch(given)
    # A baseline has one set of weights.
    default = "student" if baselines.is_baseline(given) else weights
    default = default or loading.default_weights(given)
    split.append(match.groups() if match else (given, default))
  if len(set(split)) < len(split):
    twice = next(s for s in split if split.count(s) > 1)
    raise ConfigError(
      f"--encoder={twice[0]} is given twice ({twice[1]} weights)"
    )
  paths = [path for path, _ in split]
  requests = []
  for (path, which), name in zip(split, distinct_names(paths), strict=True):
    name += f"@{which}" if paths.count(path) > 1 else ""
    requests.append(Request(path, which, name))
  return requests


def distinct_names(paths: Sequence[str]) -> list[str]:
  """The last part of each path, or as many as distinguish it from the others.

  A path that is there twice has the same name twice.
  """
  names = []
  for path in paths:
    others = {n for p in paths if p != path for n in _short_names(p)}
    names.append(next((n for n in _short_names(path) if n not in others), path))
  return names


def _short_names(path: str) -> list[str]:
  """The last part of a path, the last two, ... A baseline has one name."""
  if baselines.is_baseline(path):
    return [path]
  parts = pathlib.PurePath(path).parts
  return ["/".join(parts[-k:]) for k in range(1, len(parts) + 1)] or [path]


def evaluate(
  encoders: Mapping[str, Encoder],
  chosen: run.Plan,
  *,
  folder: str | os.PathLike | None = None,
  log_fn: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
  """Runs a plan on encoders by name, and records errors of single evaluations.

  Writes `results.json` to the folder after each evaluation, so that a killed
  process loses one evaluation only. Raises as `run.prepare`; `log_fn` is called
  with lines of progress.
  """
  evaluators, skipped, failed = run.prepare(chosen, log_fn=log_fn)
  outcomes: list[Outcome] = []
  for name, encoder in encoders.items():
    # Which weights: the student's, the teacher's or their average.
    log_fn(f"{name}: {encoder!r}")
    outcome = Outcome(
      name=name,
      encoder=encoder.source,
      weights=encoder.weights,
      skipped=dict(skipped),
      failed=dict(failed),
      protocol=encoder.protocol(),
    )
    outcomes.append(outcome)
    for _ in run.attempt(encoder, evaluators, outcome, log_fn=log_fn):
      if folder is not None and jax.process_index() == 0:
        results.write(pathlib.Path(folder) / "results.json", outcomes)
  return outcomes


def errors(outcomes: Sequence[Outcome], chosen: run.Plan) -> list[str]:
  """Errors of a finished run, a line each.

  These are failed evaluations, and evaluations requested by name that no
  encoder can run.
  """
  lines = []
  for outcome in outcomes:
    of = f" ({outcome.name})" if len(outcomes) > 1 else ""
    lines += [f"{k}{of} failed: {why}" for k, why in outcome.failed.items()]
  for name in chosen.entries:
    reasons = [o.skipped[name] for o in outcomes if name in o.skipped]
    if name in chosen.named and len(reasons) == len(outcomes):
      why = "; ".join(dict.fromkeys(reasons))
      lines.append(f"{name} can't be run: {why}")
  return lines


def write(
  folder: str | os.PathLike,
  outcomes: Sequence[Outcome],
  *,
  compared: Sequence[Outcome] = (),
  size: str | None = "base",
) -> list[pathlib.Path]:
  """Writes a folder of results; returns its files.

  `results.json`, `results.md`, `report.html`, `sheets/*.png`, `charts/*.svg`.
  Files of the same names are replaced. The other arguments are those of
  `build_report`.
  """
  folder = pathlib.Path(folder)
  report = report_lib.build_report(outcomes, compared=compared, size=size)
  results.write(folder / "results.json", outcomes)
  names = ("report.html", "results.md")
  blocks = sections.describe_report(report)
  files = write_pages("Evaluation", blocks, folder, names=names)
  return [*files, folder / "results.json"]
