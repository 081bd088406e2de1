"""Several evaluations of one encoder: a table to read and JSON to keep."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

import mtv_jax
from mtv_jax.config import ConfigError, did_you_mean
from mtv_jax.encoder import Encoder
from mtv_jax.evals.base import (
  EVALUATORS,
  Evaluator,
  Result,
  build_evaluator,
)


def configs(
  names: Sequence[str],
  *,
  data: Sequence[str] = ("scenes",),
  options: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
  """Entries as in `config.evals`, from a command line's arguments.

  Args:
    names: of evaluations, or `all`.
    data: one for every evaluation, or `NAME=DATA` for one of them.
    options: for all of them; an evaluation ignores those it has no use for.

  Raises:
    ConfigError: for a name that is no evaluation.
  """
  names = list(EVALUATORS) if list(names) == ["all"] else list(names)
  for name in names:
    if name not in EVALUATORS:
      raise ConfigError(
        f"no evaluation {name!r}. {did_you_mean(name, [*EVALUATORS, 'all'])}"
      )
  common, own = "scenes", {}
  for entry in data:
    name, equals, value = entry.partition("=")
    if equals and name in EVALUATORS:
      own[name] = value
    else:
      common = entry
  chosen = {}
  for name in names:
    fields = build_evaluator(name, {}).__dataclass_fields__
    used = {k: v for k, v in (options or {}).items() if v is not None}
    used = {k: v for k, v in used.items() if k in fields}
    chosen[name] = {"type": name, "data": own.get(name, common), **used}
  return chosen


def build(
  evals: Mapping[str, Mapping[str, Any] | ConfigDict] | ConfigDict,
) -> dict[str, Evaluator]:
  """The evaluators of a config's `evals`, by name; see `build_evaluator`."""
  return {name: build_evaluator(name, entry) for name, entry in evals.items()}


def evaluate(
  encoder: Encoder,
  evals: Mapping[str, Evaluator | Mapping[str, Any] | ConfigDict] | ConfigDict,
) -> dict[str, Result]:
  """Runs evaluations, in their order.

  Args:
    encoder: to evaluate.
    evals: by name, evaluators (which keep their data open from one call to the
      next) or entries of a config's `evals`.
  """
  built = {
    name: e if isinstance(e, Evaluator) else build_evaluator(name, e)
    for name, e in evals.items()
  }
  # A mistake in the last one should not cost the time of the others.
  for name, evaluator in built.items():
    with _named(name):
      evaluator.prepare()
  results = {}
  for name, evaluator in built.items():
    start = time.perf_counter()
    with _named(name):
      result = evaluator.run(encoder)
    seconds = round(time.perf_counter() - start, 1)
    protocol = {**result.protocol, "seconds": seconds}
    results[name] = Result(result.metrics, protocol, result.chance)
  return results


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
  """Says which evaluation an error came from."""
  try:
    yield
  except Exception as error:
    error.add_note(f"(in evaluation {name!r})")
    raise


def table(results: Mapping[str, Result]) -> str:
  """Figures in percent with chance beside them, then each protocol."""
  rows = [("evaluation", "metric", "%", "chance %")]
  for name, result in results.items():
    for metric, value in result.metrics.items():
      chance = result.chance.get(metric)
      at_random = "" if chance is None else f"{100 * chance:.2f}"
      rows.append((name, metric, f"{100 * value:.2f}", at_random))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = [
    f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
    for a, b, c, d in rows
  ]
  lines.insert(1, "-" * len(lines[0]))
  for name, result in results.items():
    lines.append(f"\n{name}:")
    lines += [f"  {k}: {_short(v)}" for k, v in result.protocol.items()]
  return "\n".join(lines)


def write_json(
  path: str | os.PathLike, encoder: Encoder, results: Mapping[str, Result]
) -> None:
  """Figures, chance and protocols, with what made them."""
  content = {
    "encoder": encoder.source,
    "weights": encoder.weights,
    "mtv_jax": mtv_jax.__version__,
    "evals": {name: result.to_dict() for name, result in results.items()},
  }
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _short(value: Any) -> str:
  if isinstance(value, list) and len(value) > 8:
    return f"{len(value)}: {value[0]!r}, {value[1]!r}, ... {value[-1]!r}"
  return str(value)
