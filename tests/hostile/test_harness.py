"""The harness itself: outcomes it accepts, and cases it kills."""

import os
import signal
import time

import numpy as np
import pytest
from hostile import harness
from hostile.harness import Cases, Runner

from mtv_jax.data.records import BadRecord
from mtv_jax.utils.errors import InputError

SAMPLES = Cases(__file__, "harness")


def _raise(folder, error):
  raise error


SAMPLES.add_table(
  _raise,
  {
    "error": InputError("x is wrong"),
    "skip": BadRecord("a", "b"),
    "defect": KeyError("k"),
    "surrogate": InputError("\ud800"),
  },
  expects="error skip",
)
SAMPLES.add("with a reason", lambda folder: ("skip", "why"), expects="skip")
SAMPLES.add("used", lambda folder: 3, expects="used")
SAMPLES.add("crash", lambda folder: os.kill(os.getpid(), signal.SIGSEGV))
SAMPLES.add("hang", lambda folder: time.sleep(60))


@SAMPLES.add("memory")
def _memory(folder):
  pages = np.zeros(128 << 20, np.uint8)
  pages[::4096] = 1
  time.sleep(1)


@pytest.fixture
def run(tmp_path, monkeypatch):
  monkeypatch.setattr(harness, "MAX_SECONDS", 3.0)
  monkeypatch.setattr(harness, "MAX_BYTES", 64 << 20)
  runner = Runner()
  cases = {case.name: case for case in SAMPLES}

  def check(name):
    folder = tmp_path / "case"
    folder.mkdir(exist_ok=True)
    return runner.check(cases[name], folder)

  yield check
  runner.close()


def test_outcomes_and_limits(run):
  assert run("error").outcome == "error"
  assert run("skip").outcome == "skip"
  assert run("with a reason").detail == "why"
  assert run("used").outcome == "used"
  with pytest.raises(AssertionError, match="got defect .*KeyError: 'k'"):
    run("defect")
  with pytest.raises(UnicodeEncodeError):
    run("surrogate")
  for name, outcome in [
    ("crash", "got crash .* exit code -11"),
    ("hang", "got slow after 3"),
    ("memory", "got large"),
  ]:
    with pytest.raises(AssertionError, match=outcome):
      run(name)
    # The next case runs in a new process.
    assert run("used").outcome == "used"


def test_table_counts_by_subject():
  results = [("tars", "error", 0.5, 3 << 20), ("tars", "failed", 2.0, 0)]
  lines = harness.table([*results, ("text", "skip", 0.0, 0)]).splitlines()
  rows = [" ".join(line.split()) for line in lines[1:]]
  assert rows == [
    "tars 2 1 0 0 1 2.0 s 3 MiB",
    "text 1 0 1 0 0 0.0 s 0 MiB",
    "all 3 1 1 0 1 2.0 s 3 MiB",
  ]
