"""What a process says when its requests to process 0 fail."""

import sys
import threading
import types

import jax
import pytest
import trainings
from jax._src import distributed

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.config import recipes
from mtv_jax.train.runtime import peers
from mtv_jax.train.train import train

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


@pytest.mark.parametrize(
  "error",
  [jax.errors.JaxRuntimeError("INTERNAL: odd"), TypeError("a defect")],
  ids=lambda error: type(error).__name__,
)
def test_repeated_errors_are_named(watch, error):
  line = watch(Client(error, failures=10**6), exits=True)
  assert line == (
    "requests to process 0 have failed for 1 s"
    f" ({type(error).__name__}: {error})"
  )


def test_requests_that_never_return_are_a_silent_process(watch):
  line = watch(Client(failures=1), exits=True)
  assert line == "process 0 has not answered for 1 s"


def test_one_error_ends_nothing(watch):
  client = Client(TypeError("a defect"), failures=1)
  assert watch(client, exits=False) is None and client.calls >= 2


def test_a_lost_process_is_known_by_the_error(watch):
  error = jax.errors.JaxRuntimeError("UNAVAILABLE: gone")
  line = watch(Client(error, failures=10**6), exits=True)
  assert line.startswith("another process of the run is lost")


def test_a_process_lost_amid_a_restore_is_known_by_the_error(
  monkeypatch, tmp_path
):
  def restore(*_, **__):
    raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed")

  errors = []
  monkeypatch.setattr(Checkpointer, "restore", restore)
  monkeypatch.setattr(peers, "exit_if_lost", errors.append)
  with pytest.raises(jax.errors.JaxRuntimeError, match="AllGather"):
    train(recipes.read_config(str(trainings.CONFIG)), tmp_path)
  assert len(errors) == 1
