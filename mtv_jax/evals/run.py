"""Evaluations of one encoder: chosen from a command line or a config, run."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mtv_jax.config import overrides
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import base
from mtv_jax.evals.core.base import Evaluator, NotApplicable, Result
from mtv_jax.evals.core.results import Outcome, write_json
from mtv_jax.utils.errors import ConfigError, did_you_mean

__all__ = [
  "Plan",
  "Prepared",
  "attempt",
  "build",
  "evaluate",
  "plan",
  "prepare",
  "write_json",
]


# Characters of an error that are kept: XLA can write pages.
_REASON = 1000


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a command line asks for.

  Attributes:
    entries: as in `config.evals`, by name.
    named: those that were asked for by name, and not as a part of `all`: they
      must run, and what keeps one from running is an error.
  """

  entries: dict[str, dict[str, Any]]
  named: frozenset[str] = frozenset()


def plan(
  names: Sequence[str],
  *,
  data: Sequence[str] = ("scenes",),
  options: Mapping[str, Any] | None = None,
  preferences: Mapping[str, Any] | None = None,
  assignments: Sequence[str] = (),
) -> Plan:
  """Entries as in `config.evals`, from a command line's arguments.

  Args:
    names: of evaluations, or `all`.
    data: one for every evaluation, or `NAME=DATA` for one of them.
    options: for those of the evaluations that have an option of that name;
      None is not given.
    preferences: the same, where it is no mistake if none has one.
    assignments: `NAME.OPTION=VALUE`, typed like overrides of a config.

  Raises:
    ConfigError: for a name that is no evaluation or was not chosen, or an
      option that none of the chosen ones has.
  """
  chosen = _chosen(names)
  common, own = _split_data(data)
  defaults = {name: base.default_options(name) for name in chosen}
  given = {name: {"data": own.get(name, common)} for name in chosen}
  wanted = {k: v for k, v in (options or {}).items() if v is not None}
  for option, value in {**(preferences or {}), **wanted}.items():
    takers = [name for name in chosen if option in defaults[name]]
    if option in wanted and not takers:
      known = {o for fields in defaults.values() for o in fields}
      raise ConfigError(
        f"--{option}: none of {', '.join(chosen)} has such an option. "
        f"{did_you_mean(option, known)}"
      )
    for name in takers:
      given[name][option] = value
  touched = _assign(given, defaults, assignments)
  for name in own:
    if name not in chosen:
      raise ConfigError(
        f"--data={name}=...: {name} is not among the chosen evaluations. "
        f"{did_you_mean(name, chosen)}"
      )
  named = {*own, *touched} if list(names) == ["all"] else set(chosen)
  entries = {name: {"type": name, **given[name]} for name in chosen}
  return Plan(entries, frozenset(named))


def _chosen(names: Sequence[str]) -> list[str]:
  names = [*base.EVALUATORS] if list(names) == ["all"] else [*names]
  for name in names:
    if name not in base.EVALUATORS:
      known = [*base.EVALUATORS, "all"]
      raise ConfigError(f"no evaluation {name!r}. {did_you_mean(name, known)}")
  return list(dict.fromkeys(names))


def _split_data(data: Sequence[str]) -> tuple[str, dict[str, str]]:
  common, own = "scenes", {}
  for entry in data:
    name, equals, value = entry.partition("=")
    if equals and name in base.EVALUATORS:
      own[name] = value
    else:
      common = entry
  return common, own


def _assign(
  given: dict[str, dict[str, Any]],
  defaults: Mapping[str, Mapping[str, Any]],
  assignments: Sequence[str],
) -> set[str]:
  """Sets what the assignments say; returns the evaluations they name."""
  touched = {}
  for assignment in assignments:
    name, dot, rest = assignment.partition(".")
    option = rest.partition("=")[0].partition(".")[0].partition("[")[0]
    if not dot or "=" not in rest:
      raise ConfigError(
        f"--set={assignment}: expected NAME.OPTION=VALUE, such as "
        "--set=retrieval.max_captions=5"
      )
    for key, known, what in (
      (name, defaults, "no such evaluation is chosen"),
      (option, defaults.get(name, ()), f"{name} has no option {option!r}"),
    ):
      if key not in known:
        raise ConfigError(
          f"--set={assignment}: {what}. {did_you_mean(key, known)}"
        )
    touched.setdefault(name, set()).add(option)
  options = {name: {**defaults[name], **given[name]} for name in touched}
  try:
    typed = overrides.override(ConfigDict(options), assignments).to_dict()
  except ConfigError as error:
    # The same mistakes as in a config, under another flag.
    message = str(error).replace("--config.", "--set=", 1)
    raise ConfigError(message) from None
  for name, changed in touched.items():
    given[name].update({option: typed[name][option] for option in changed})
  return set(touched)


def build(
  evals: Mapping[str, Mapping[str, Any] | ConfigDict] | ConfigDict,
) -> dict[str, Evaluator]:
  """The evaluators of a config's `evals`, by name; see `build_evaluator`."""
  return {
    name: base.build_evaluator(name, entry) for name, entry in evals.items()
  }


def evaluate(
  encoder: Encoder,
  evals: Mapping[str, Evaluator | Mapping[str, Any] | ConfigDict] | ConfigDict,
) -> dict[str, Result]:
  """Runs evaluations, in their order; the first error ends it.

  Args:
    encoder: to evaluate.
    evals: by name, evaluators (which keep their data open from one call to the
      next) or entries of a config's `evals`.
  """
  built = {
    name: e if isinstance(e, Evaluator) else base.build_evaluator(name, e)
    for name, e in evals.items()
  }
  # A mistake in the last one should not cost the time of the others.
  for name, evaluator in built.items():
    with _named(name):
      evaluator.prepare()
  return {name: _timed(name, e, encoder) for name, e in built.items()}


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Evaluators whose data are open, and what could not be opened.

  Attributes:
    evaluators: by name.
    skipped: by name, why the data are not for this evaluation.
    failed: by name, what went wrong.
    named: see `Plan`.
  """

  evaluators: dict[str, Evaluator]
  skipped: dict[str, str]
  failed: dict[str, str]
  named: frozenset[str]


def prepare(
  chosen: Plan, *, say: Callable[[str], None] = lambda line: None
) -> Prepared:
  """Builds the evaluators of a plan and opens their data.

  Args:
    chosen: from `plan`.
    say: is told of each evaluation that won't run.

  Raises:
    ConfigError: for a bad option.
    Exception: whatever an evaluation that was asked for by name raises, or the
      last one if none could be prepared.
  """
  ready, skipped, failed = {}, {}, {}
  last = None
  for name, evaluator in build(chosen.entries).items():
    try:
      with _named(name):
        evaluator.prepare()
      ready[name] = evaluator
    except Exception as error:
      if name in chosen.named:
        raise
      last = error
      kind = skipped if isinstance(error, NotApplicable) else failed
      kind[name] = str(error)
      say(f"{name} {'is skipped' if kind is skipped else 'FAILED'}: {error}")
  if not ready and last is not None:
    raise last
  return Prepared(ready, skipped, failed, chosen.named)


def attempt(
  encoder: Encoder,
  prepared: Prepared,
  *,
  name: str,
  say: Callable[[str], None] = lambda line: None,
) -> Iterator[Outcome]:
  """Runs prepared evaluations one by one, whatever becomes of each.

  Args:
    encoder: to evaluate.
    prepared: from `prepare`.
    name: what the encoder is called in tables.
    say: is told of each evaluation as it ends.

  Yields:
    After each evaluation, all that there is until then. The last one is the
    outcome; at least one is given.

  Raises:
    Exception: what an evaluation raises on a pod of several hosts: the others
      may wait for this one in it, and would not meet it in the next.
  """
  outcome = Outcome(
    name=name,
    encoder=encoder.source,
    weights=encoder.weights,
    skipped=dict(prepared.skipped),
    failed=dict(prepared.failed),
    protocol=encoder.protocol(),
  )
  if not prepared.evaluators:
    yield outcome
  for kind, evaluator in prepared.evaluators.items():
    try:
      result = _timed(kind, evaluator, encoder)
      outcome.results[kind] = result
      say(f"{kind} took {result.protocol['seconds']} s")
    except NotApplicable as error:
      outcome.skipped[kind] = str(error)
      say(f"{kind} is skipped: {error}")
    except Exception as error:
      if jax.process_count() > 1:
        yield outcome
        raise
      reason = f"{type(error).__name__}: {error}"
      outcome.failed[kind] = reason[:_REASON]
      say("".join(traceback.format_exception(error)) + f"{kind} FAILED")
    yield outcome


def _timed(name: str, evaluator: Evaluator, encoder: Encoder) -> Result:
  start = time.perf_counter()
  with _named(name):
    result = evaluator.run(encoder)
  seconds = round(time.perf_counter() - start, 1)
  protocol = {**result.protocol, "seconds": seconds}
  return dataclasses.replace(result, protocol=protocol)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
  """Says which evaluation an error came from."""
  try:
    yield
  except Exception as error:
    error.add_note(f"(in evaluation {name!r})")
    raise
