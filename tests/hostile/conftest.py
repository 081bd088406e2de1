"""The process that runs hostile cases, shared by the tests of a session."""

import pytest
from hostile.harness import Runner


@pytest.fixture(scope="session")
def _runner():
  runner = Runner()
  yield runner
  runner.close()


@pytest.fixture
def hostile(_runner, tmp_path, record_property):
  """Runs a case and checks its outcome, time and memory."""

  def check(case):
    row = [case.subject, "failed", 0.0, 0]
    try:
      result = _runner.check(case, tmp_path)
      row[1:] = [result.outcome, result.seconds, result.peak]
    finally:
      record_property("hostile", tuple(row))

  return check
