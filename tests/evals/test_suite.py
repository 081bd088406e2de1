"""Stored results of several encoders, on one host and on several."""

import dataclasses
import functools
import os
import sys

import jax
import numpy as np
import pytest

from mtv_jax.encoder import baselines
from mtv_jax.evals import run, suite
from mtv_jax.evals.core import base
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.store import ResultStore

CALLS: list[str] = []  # Calls of evaluators, in order.
ERRORS: list[Exception] = []  # Errors for `Second` to raise.


@dataclasses.dataclass(frozen=True)
class First(base.Evaluator):
  """An evaluator that any encoder passes."""

  data: str = "scenes"

  def run(self, encoder):
    CALLS.append("first")
    sheets = {name: np.zeros((2, 2, 3), np.uint8) for name in ("b: 1", "a")}
    return Result({"x": 0.5}, {"data_hash": "1"}, sheets=sheets)


@dataclasses.dataclass(frozen=True)
class Second(First):
  """An evaluator that raises the errors in `ERRORS`."""

  def run(self, encoder):
    CALLS.append("second")
    for error in ERRORS:
      raise error
    return Result({"x": 0.1}, {"data_hash": "1"})


@pytest.fixture(autouse=True)
def evaluators(monkeypatch):
  evaluators = {"second": f"{__name__}:Second", "first": f"{__name__}:First"}
  monkeypatch.setattr(base, "EVALUATORS", evaluators)
  CALLS.clear()
  ERRORS[:] = [RuntimeError("out of memory")]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("names", [["first", "second"], ["second", "first"]])
def test_a_failed_evaluation_runs_again(
  names, processes, tmp_path, monkeypatch
):
  """On several hosts the error is raised, since other hosts may wait."""
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  monkeypatch.setattr(suite, "any_process", lambda flag: flag)
  store = ResultStore(tmp_path / "a", {})
  encoders = {
    "a": suite.StoredEncoder(
      functools.partial(baselines.load, "pixels:8/8"), store
    )
  }
  plan = run.plan(names)
  if processes > 1:
    with pytest.raises(RuntimeError, match="out of memory"):
      suite.evaluate(encoders, plan)
  else:
    (outcome,) = suite.evaluate(encoders, plan)
    assert list(outcome.failed) == ["second"]
  assert not (store.folder / "second.json").exists()
  ERRORS.clear()
  done = [name for name in names if (store.folder / f"{name}.json").exists()]
  CALLS.clear()
  lines = []
  (outcome,) = suite.evaluate(encoders, plan, log_fn=lines.append)
  assert [*done, *CALLS] == sorted(names, key=lambda n: n not in done)
  assert list(outcome.results) == names
  # A page of stored results is as the first one.
  assert [*outcome.results["first"].sheets] == ["b: 1", "a"]
  assert outcome.results["first"].type == "first"
  reused = [line for line in lines if "reuses the stored result of" in line]
  assert len(reused) == len(done)


def test_a_result_that_cannot_be_stored_is_reported(tmp_path):
  """By a full disk, or by another command that stores the same one."""
  (tmp_path / "first").touch()  # The folder of its sheets.
  load = functools.partial(baselines.load, "pixels:8/8")
  stored = suite.StoredEncoder(load, ResultStore(tmp_path, {}))
  lines = []
  options = dict(folder=tmp_path, log_fn=lines.append)
  (outcome,) = suite.evaluate({"a": stored}, run.plan(["first"]), **options)
  assert outcome.results["first"].metrics == {"x": 0.5}
  assert "can't be stored" in lines[-1]
  assert (tmp_path / "results.json").exists()


def test_an_edited_evaluation_runs_again(tmp_path, monkeypatch):
  ERRORS.clear()
  (tmp_path / "code.py").write_text("1")
  monkeypatch.setattr(sys.modules[__name__], "__file__", tmp_path / "code.py")
  load = functools.partial(baselines.load, "pixels:8/8")
  stored = suite.StoredEncoder(load, ResultStore(tmp_path / "a", {}))
  for code, calls in (("1", ["first"]), ("1", []), ("12", ["first"])):
    CALLS.clear()
    (tmp_path / "code.py").write_text(code)
    os.utime(tmp_path / "code.py", (1, 1))
    suite.evaluate({"a": stored}, run.plan(["first"]))
    assert calls == CALLS


def test_without_encoders_nothing_is_prepared(monkeypatch):
  monkeypatch.setattr(First, "prepare", None)
  plan = run.plan(["first"])
  assert suite.evaluate({}, plan) == suite.errors([], plan) == []
