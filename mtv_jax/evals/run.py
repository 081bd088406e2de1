"""Evaluation of one encoder, from a command line or a config."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from mtv_jax.config import overrides
from mtv_jax.config.options import is_plugin
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import base, global_features
from mtv_jax.evals.core.base import Evaluator, NotApplicable, Result
from mtv_jax.evals.core.results import Outcome
from mtv_jax.utils import progress
from mtv_jax.utils.errors import ConfigError, UserError, did_you_mean

# Maximum length of an error message in the results: XLA's can be pages long.
_MAX_REASON = 1000


class EvaluationPlan(NamedTuple):
  """Evaluations requested on the command line."""

  entries: dict[str, dict[str, Any]]  # as in `config.evals`
  # Evaluations requested by name, not by `all`: they fail if they can't run.
  named: frozenset[str] = frozenset()


def plan(
  names: Sequence[str],
  *,
  data: Sequence[str] = ("scenes",),
  options: Mapping[str, Any] | None = None,
  preferences: Mapping[str, Any] | None = None,
  assignments: Sequence[str] = (),
) -> EvaluationPlan:
  """Builds a plan from command-line arguments.

  `names` may be `all`; `data` are `DATA` for every evaluation, or `NAME=DATA`.
  `options` apply to every evaluation that has the option, and at least one must
  have it; None is ignored. `preferences` are the same, but may apply to none.
  `assignments` are `NAME.OPTION=VALUE`, typed like config overrides.
  """
  requested = _expand_names(names)
  common, by_name = _split_data(data)
  defaults = {name: base.default_options(name) for name in requested}
  options_by_name = {
    name: {"data": by_name.get(name, common)} for name in requested
  }
  options = {k: v for k, v in (options or {}).items() if v is not None}
  for option, value in {**(preferences or {}), **options}.items():
    matches = [name for name in requested if option in defaults[name]]
    if option in options and not matches:
      option_names = {o for fields in defaults.values() for o in fields}
      raise ConfigError(
        f"--{option}: none of {', '.join(requested)} has such an option. "
        f"{did_you_mean(option, option_names)}"
      )
    for name in matches:
      options_by_name[name][option] = value
  assigned = _assign(options_by_name, defaults, assignments)
  for name in by_name:
    if name not in requested:
      raise ConfigError(
        f"--data={name}=...: {name} is not among the requested evaluations. "
        f"{did_you_mean(name, requested)}"
      )
  named = {*by_name, *assigned} if list(names) == ["all"] else set(requested)
  entries = {
    name: {"type": name, **options_by_name[name]} for name in requested
  }
  return EvaluationPlan(entries, frozenset(named))


def _expand_names(names: Sequence[str]) -> list[str]:
  names = [*base.EVALUATORS] if list(names) == ["all"] else [*names]
  for name in names:
    if not _is_evaluation(name):
      types = [*base.EVALUATORS, "all"]
      raise ConfigError(f"no evaluation {name!r}. {did_you_mean(name, types)}")
  return list(dict.fromkeys(names))


def _is_evaluation(name: str) -> bool:
  return name in base.EVALUATORS or is_plugin(name)


def _split_data(data: Sequence[str]) -> tuple[str, dict[str, str]]:
  """Data for all evaluations, and for single evaluations by name."""
  common, by_name = "scenes", {}
  for entry in data:
    name, equals, value = entry.partition("=")
    if equals and _is_evaluation(name):
      by_name[name] = value
    else:
      common = entry
  return common, by_name


def _assign(
  options_by_name: Mapping[str, dict],
  defaults: Mapping,
  assignments: Sequence[str],
) -> set[str]:
  """Adds the assignments to the options; returns the evaluations they name."""
  pairs_by_name = {}
  for assignment in assignments:
    # The module of a plug-in may have dots.
    matches = (n for n in options_by_name if assignment.startswith(f"{n}."))
    name = next(matches, assignment.partition(".")[0])
    dot, expr = assignment[len(name) :][:1], assignment[len(name) + 1 :]
    option = expr.partition("=")[0].partition(".")[0].partition("[")[0]
    if not dot or "=" not in expr:
      raise ConfigError(
        f"--set={assignment}: expected NAME.OPTION=VALUE, such as "
        "--set=retrieval.max_captions=5"
      )
    for key, choices, problem in (
      (name, defaults, "this evaluation is not requested"),
      (option, defaults.get(name, ()), f"{name} has no option {option!r}"),
    ):
      if key not in choices:
        raise ConfigError(
          f"--set={assignment}: {problem}. {did_you_mean(key, choices)}"
        )
    pairs_by_name.setdefault(name, []).append((option, expr))
  for name, pairs in pairs_by_name.items():
    values = ConfigDict({**defaults[name], **options_by_name[name]})
    try:
      typed = overrides.override(values, [expr for _, expr in pairs]).to_dict()
    except ConfigError as error:
      # Name the flag that the user typed.
      text = str(error).replace("--config.", f"--set={name}.", 1)
      raise ConfigError(text) from None
    options_by_name[name].update({option: typed[option] for option, _ in pairs})
  return set(pairs_by_name)


def build(
  evals: Mapping[str, Mapping[str, Any] | ConfigDict] | ConfigDict,
) -> dict[str, Evaluator]:
  """Builds the evaluators of a config's `evals`; see `build_evaluator`."""
  return {
    name: base.build_evaluator(name, entry) for name, entry in evals.items()
  }


def evaluate(
  encoder: Encoder,
  evals: Mapping[str, Evaluator | Mapping[str, Any] | ConfigDict] | ConfigDict,
) -> dict[str, Result]:
  """Runs evaluations in order; stops at the first error.

  `evals` maps names to evaluators (whose data stay open between calls) or to
  entries of a config's `evals`.
  """
  evaluators = {
    name: e if isinstance(e, Evaluator) else base.build_evaluator(name, e)
    for name, e in evals.items()
  }
  # Fail on mistakes before the first evaluation runs.
  for name, evaluator in evaluators.items():
    with _add_name(name):
      evaluator.prepare()
  global_features.share_features(encoder, evaluators.values())
  return {name: _run(name, e, encoder) for name, e in evaluators.items()}


def prepare(
  plan: EvaluationPlan, *, log_fn: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, Evaluator], dict[str, str], dict[str, str]]:
  """Builds a plan's evaluators and opens their data.

  Returns evaluators, reasons for skipping, and errors, each by evaluation.
  """
  evaluators, skipped, failed = {}, {}, {}
  last_error = None
  for name, evaluator in build(plan.entries).items():
    try:
      with _add_name(name):
        evaluator.prepare()
      evaluators[name] = evaluator
    except Exception as error:
      if name in plan.named:
        raise
      last_error = error
      dest = skipped if isinstance(error, NotApplicable) else failed
      dest[name] = str(error)
      log_fn(f"{name} {'is skipped' if dest is skipped else 'FAILED'}: {error}")
  if not evaluators and last_error is not None:
    raise last_error
  return evaluators, skipped, failed


def attempt(
  encoder: Encoder,
  evaluators: Mapping[str, Evaluator],
  outcome: Outcome,
  *,
  log_fn: Callable[[str], None] = lambda line: None,
) -> Iterator[Outcome]:
  """Runs prepared evaluations; yields the outcome after each, at least once."""
  if not evaluators:
    yield outcome
  for name, evaluator in evaluators.items():
    try:
      result = _run(name, evaluator, encoder)
      outcome.results[name] = result
      log_fn(f"{name} took {result.protocol['seconds']} s")
    except NotApplicable as error:
      outcome.skipped[name] = str(error)
      log_fn(f"{name} is skipped: {error}")
    except Exception as error:
      if jax.process_count() > 1:
        yield outcome
        raise
      reason = f"{type(error).__name__}: {error}"
      outcome.failed[name] = reason[:_MAX_REASON]
      if isinstance(error, UserError):
        log_fn(f"{name} FAILED: {error}")
      else:
        log_fn("".join(traceback.format_exception(error)) + f"{name} FAILED")
    yield outcome


def _run(name: str, evaluator: Evaluator, encoder: Encoder) -> Result:
  start = time.perf_counter()
  with _add_name(name), progress.activity(f"evaluation {name}"):
    result = evaluator.run(encoder)
  extra = {"options": evaluator.changed_options()}
  extra["seconds"] = round(time.perf_counter() - start, 1)
  protocol = {**result.protocol, **extra}
  fields = dict(type=base.evaluator_type(evaluator), main=evaluator.main)
  return dataclasses.replace(result, protocol=protocol, **fields)


@contextlib.contextmanager
def _add_name(name: str) -> Iterator[None]:
  """Adds the evaluation's name to an error."""
  try:
    yield
  except Exception as error:
    error.add_note(f"(in evaluation {name!r})")
    raise
