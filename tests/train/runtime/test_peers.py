"""What a process says when its requests to process 0 fail."""

import sys
import threading
import types

import jax
import pytest
import trainings
from jax._src import distributed

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.cli.train import train
from mtv_jax.train.runtime import peers

SECONDS = 1.0

# The threads end by SystemExit instead of the process.
pytestmark = pytest.mark.filterwarnings(
  "ignore:Exception in thread"
  " peers:pytest.PytestUnhandledThreadExceptionWarning"
)


class Client:
  """A key-value store whose requests raise an error, or never return."""

  def __init__(self, error=None, failures=0):
    self.error, self.left, self.calls = error, failures, 0
    self.released, self.succeeded = threading.Event(), threading.Event()

  def key_value_set(self, key, value, allow_overwrite):
    self.calls += 1
    if self.left:
      self.left -= 1
      if self.error is None:
        self.released.wait()
      else:
        raise self.error
    elif value.isdigit():
      self.succeeded.set()

  def key_value_dir_get(self, prefix):
    return []


@pytest.fixture
def watch(monkeypatch):
  """Watches with a client until an exit; returns its line, or None."""

  def run(client, *, exits):
    state = types.SimpleNamespace(client=client)
    monkeypatch.setattr(distributed, "global_state", state)
    with peers.watch_peers(SECONDS):
      done = exited if exits else client.succeeded
      assert done.wait(30)
      client.left = 0
      client.released.set()
    # A thread that ends after its test would fail the next one.
    for thread in threading.enumerate():
      if thread.name.startswith("peers"):
        thread.join(30)
    return lines[0] if lines else None

  lines, exited = [], threading.Event()

  def exit_now(reason):
    lines.append(reason)
    assert threading.current_thread().name.startswith("peers")
    exited.set()
    sys.exit()  # Ends the thread.

  monkeypatch.setattr(peers, "exit_now", exit_now)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  # The backend would be initialised with the client.
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  return run


FAILED = "requests to process 0 have failed for 1 s"


@pytest.mark.parametrize(
  ("error", "failures", "line"),
  [
    (
      jax.errors.JaxRuntimeError("INTERNAL: odd"),
      10**6,
      f"{FAILED} (JaxRuntimeError: INTERNAL: odd)",
    ),
    (TypeError("a defect"), 10**6, f"{FAILED} (TypeError: a defect)"),
    # Requests that never return.
    (None, 1, "process 0 has not answered for 1 s"),
    (
      jax.errors.JaxRuntimeError("UNAVAILABLE: gone"),
      10**6,
      "another process of the run is lost",
    ),
  ],
)
def test_failing_requests_end_the_process(watch, error, failures, line):
  assert watch(Client(error, failures), exits=True).startswith(line)


def test_one_error_ends_nothing(watch):
  client = Client(TypeError("a defect"), failures=1)
  assert watch(client, exits=False) is None and client.calls >= 2


def test_a_process_lost_amid_a_restore_is_known_by_the_error(
  monkeypatch, tmp_path
):
  def restore(*_, **__):
    raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed")

  errors = []
  monkeypatch.setattr(Checkpointer, "restore", restore)
  monkeypatch.setattr(peers, "exit_if_lost", errors.append)
  with pytest.raises(jax.errors.JaxRuntimeError, match="AllGather"):
    train(trainings.smallest(), tmp_path)
  assert len(errors) == 1
