"""The process that runs hostile cases, shared by the tests of a session."""

import pytest
from hostile.harness import Runner


@pytest.fixture(scope="session")
def _runner():
  runner = Runner()
  yield runner
  runner.close()


@pytest.fixture
def hostile(_runner, tmp_path):
  """Runs a case and checks its outcome, time and memory."""
  return lambda case: _runner.check(case, tmp_path)
