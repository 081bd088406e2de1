"""The harness itself: outcomes it accepts, and cases it kills."""

import os
import pathlib
import pickle
import signal
import time

import numpy as np
import pytest
from hostile import harness
from hostile.harness import Cases, Runner
from hostile.samples import BROKEN_BYTES

from mtv_jax.data.records import BadRecord
from mtv_jax.utils.errors import InputError

SAMPLES = Cases(__file__, "harness")


def _raise(folder, error):
  raise error


def _fill_memory(folder):
  pages = np.zeros(128 << 20, np.uint8)
  pages[::4096] = 1
  time.sleep(1)


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
SAMPLES.add("outside", lambda folder: (folder.parent / "x").touch())
SAMPLES.add("home", lambda folder: pathlib.Path("~/x").expanduser().touch())
SAMPLES.add("executed", lambda _: pickle.loads(BROKEN_BYTES["a pickle"](b"")))
SAMPLES.add("crash", lambda folder: os.kill(os.getpid(), signal.SIGSEGV))
SAMPLES.add("hang", lambda folder: time.sleep(60))
SAMPLES.add("memory", _fill_memory)


def test_outcomes_and_limits(tmp_path, monkeypatch):
  monkeypatch.setattr(harness, "MAX_SECONDS", 2.0)
  monkeypatch.setattr(harness, "MAX_BYTES", 64 << 20)
  runner = Runner()
  cases = {case.name: case for case in SAMPLES}

  def run(name):
    return runner.check(cases[name], tmp_path / name)

  assert run("error").outcome == "error"
  assert run("skip").outcome == "skip"
  assert run("with a reason").detail == "why"
  for name, error, message in [
    ("defect", AssertionError, "got defect .*KeyError: 'k'"),
    ("surrogate", UnicodeEncodeError, "surrogates"),
    ("outside", AssertionError, "outside: .*'parent/x'"),
    ("home", AssertionError, "outside: .*'home/x'"),
    ("executed", AssertionError, "outside: .*'parent/executed'"),
    ("crash", AssertionError, "got crash .* exit code -11"),
    ("hang", AssertionError, "got slow after 2"),
    ("memory", AssertionError, "got large"),
  ]:
    # In a new process if the last one was killed.
    assert run("used").outcome == "used"
    with pytest.raises(error, match=message):
      run(name)
  runner.close()
