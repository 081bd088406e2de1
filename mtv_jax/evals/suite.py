"""Runs evaluations on several encoders and writes their results."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals import run
from mtv_jax.evals.core import global_features, results
from mtv_jax.evals.core.base import Evaluator
from mtv_jax.evals.core.feature_cache import FeatureFolder
from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.store import ResultStore, fingerprint
from mtv_jax.parallel.distributed import any_process
from mtv_jax.utils.errors import UserError


class StoredEncoder(NamedTuple):
  """An encoder with stored results; loaded only if a result is missing."""

  load: Callable[[], Encoder]
  store: ResultStore


def evaluate(
  encoders: Mapping[str, Encoder | StoredEncoder],
  plan: run.EvaluationPlan,
  *,
  checkpoints: Mapping[str, str] | None = None,
  folder: str | os.PathLike | None = None,
  features: FeatureFolder | None = None,
  log_fn: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
  """Runs a plan on named encoders; records errors of single evaluations.

  Writes `FOLDER/results.json` after each evaluation, so that a killed process
  loses at most one, and caches image features in `features`. Raises the errors
  of `run.prepare`. Opens no data if `encoders` is empty.
  """
  if not encoders:
    return []
  evaluators, skipped, failed = run.prepare(plan, log_fn=log_fn)
  outcomes: list[Outcome] = []
  for name, encoder in encoders.items():
    outcome = Outcome(name, "", "", {}, {**skipped}, {**failed})
    checkpoint = (checkpoints or {}).get(name, "")
    outcome = dataclasses.replace(outcome, checkpoint=checkpoint)
    outcomes.append(outcome)
    updates = _evaluate(encoder, plan, evaluators, outcome, features, log_fn)
    for partial in updates:
      outcomes[-1] = partial
      if folder is not None and jax.process_index() == 0:
        results.write(pathlib.Path(folder) / "results.json", outcomes)
  return outcomes


def _evaluate(
  encoder: Encoder | StoredEncoder,
  plan: run.EvaluationPlan,
  evaluators: Mapping[str, Evaluator],
  outcome: Outcome,
  features: FeatureFolder | None,
  log_fn: Callable[[str], None],
) -> Iterator[Outcome]:
  """Yields the outcome of an encoder after each evaluation, at least once.

  An encoder that can't be loaded fails every evaluation that isn't stored.
  """
  store, stored_outcomes = None, {}
  if isinstance(encoder, StoredEncoder):
    encoder, store = encoder
    stored_outcomes = _find_stored(store, plan, evaluators)
    for name, stored in stored_outcomes.items():
      log_fn(f"{outcome.name}: reuses the stored result of {name}")
      outcome = _copy_description(outcome, stored)
      outcome.results.update(stored.results)
      outcome.skipped.update(stored.skipped)
  missing = {k: e for k, e in evaluators.items() if k not in stored_outcomes}
  if missing or not stored_outcomes:
    try:
      encoder = encoder() if store else encoder
    except UserError as error:
      # Skip this encoder; on several hosts raise, as others would wait for it.
      if not missing or jax.process_count() > 1:
        raise
      outcome.failed.update(dict.fromkeys(missing, str(error)))
      yield sort_results(outcome, plan)
      return
    log_fn(f"{outcome.name}: {encoder!r}")
    loaded = Outcome("", encoder.source, encoder.weights)
    loaded.protocol.update(encoder.protocol())
    outcome = _copy_description(outcome, loaded)
  if not missing:
    yield sort_results(outcome, plan)
    return
  # All evaluations, so that a restarted command encodes equal batches.
  global_features.share_features(encoder, evaluators.values(), features)
  for name, _ in zip(
    missing, run.attempt(encoder, missing, outcome, log_fn=log_fn), strict=True
  ):
    # On several hosts, an evaluation that raises has neither.
    has_outcome = name in outcome.results or name in outcome.skipped
    if store and has_outcome and jax.process_index() == 0:
      try:
        store.write(name, _identify(name, plan, missing[name]), outcome)
      except OSError as error:  # Another command may be storing the same one.
        log_fn(f"{name}: the result can't be stored ({error})")
    yield sort_results(outcome, plan)


def _find_stored(
  store: ResultStore,
  plan: run.EvaluationPlan,
  evaluators: Mapping[str, Evaluator],
) -> dict[str, Outcome]:
  """Evaluations stored by process 0; other processes get empty outcomes."""
  is_main = jax.process_index() == 0
  outcomes = {}
  for name, evaluator in evaluators.items():
    entry = _identify(name, plan, evaluator) if is_main else {}
    stored = store.find(name, entry) if is_main else None
    if any_process(stored is not None):
      outcomes[name] = stored or Outcome("", "", "")
  return outcomes


def _identify(
  name: str, plan: run.EvaluationPlan, evaluator: Evaluator
) -> dict[str, Any]:
  """The plan's entry, with hashes of the opened data and of the source file."""
  module = sys.modules[type(evaluator).__module__]
  code = fingerprint(getattr(module, "__file__", None) or "")
  return {**plan.entries[name], "hashes": (evaluator.data_digest(), code)}


def _copy_description(outcome: Outcome, source: Outcome) -> Outcome:
  """Copies the description of the encoder from `source`."""
  names = ("encoder", "weights", "protocol")
  fields = {name: getattr(source, name) for name in names}
  return dataclasses.replace(outcome, **fields)


def sort_results(outcome: Outcome, plan: run.EvaluationPlan) -> Outcome:
  """Sorts results, skips and failures in the order of the plan."""
  sorted_fields = {}
  for field in ("results", "skipped", "failed"):
    values = getattr(outcome, field)
    sorted_fields[field] = {n: values[n] for n in plan.entries if n in values}
  return dataclasses.replace(outcome, **sorted_fields)


def errors(outcomes: Sequence[Outcome], plan: run.EvaluationPlan) -> list[str]:
  """Error lines of a finished run.

  One per failed evaluation, and one per evaluation requested by name that no
  encoder can run.
  """
  lines = []
  for outcome in outcomes:
    suffix = f" ({outcome.name})" if len(outcomes) > 1 else ""
    lines += [f"{k}{suffix} failed: {why}" for k, why in outcome.failed.items()]
  for name in plan.entries if outcomes else ():
    reasons = [o.skipped[name] for o in outcomes if name in o.skipped]
    if name in plan.named and len(reasons) == len(outcomes):
      why = "; ".join(dict.fromkeys(reasons))
      lines.append(f"{name} can't be run: {why}")
  return lines
