"""Prefetching of batches to the devices, interruptible by signals."""

import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from mtv_jax.data import pipeline
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.train.runtime import preemption

# Interval between calls of `interrupted`.
_POLL_SECONDS = 0.1
# Timeout for reads in progress when a run ends.
_CLOSE_SECONDS = 10.0


class Interrupted(Exception):
  """Raised instead of returning a batch if the run should stop."""


class BackgroundLoader(contextlib.AbstractContextManager):
  """Reads the batches of a loader in a thread, one per `next`.

  The main thread, in which Python runs signal handlers, polls with a short
  timeout, so a stalled reader does not delay signals.

  Args:
    loader: closed with this object.
    interrupted: `next` raises Interrupted once this returns True.
  """

  def __init__(self, loader: pipeline.Loader, interrupted: Callable[[], bool]):
    self.loader = loader
    self._interrupted = interrupted
    self._calls: queue.SimpleQueue = queue.SimpleQueue()
    self._replies: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(
      target=self._serve_calls, name="loader", daemon=True
    )
    self._thread.start()

  def _serve_calls(self) -> None:
    while (call := self._calls.get()) is not None:
      try:
        self._replies.put((call(self.loader), None))
      except BaseException as error:
        self._replies.put((None, error))

  def __iter__(self) -> Iterator[pipeline.Batch]:
    return self

  def __next__(self) -> pipeline.Batch:
    self._calls.put(next)
    while True:
      try:
        batch, error = self._replies.get(timeout=_POLL_SECONDS)
      except queue.Empty:
        if self._interrupted():
          raise Interrupted from None
        continue
      if error is not None:
        raise error
      return batch

  def close(self) -> None:
    """Closes the loader, or abandons its threads if they don't end."""
    self._calls.put(pipeline.Loader.close)
    self._calls.put(None)
    self._thread.join(_CLOSE_SECONDS)
    if self._thread.is_alive():
      preemption.abandon_threads("a reader does not answer")

  def __exit__(self, *error: object) -> None:
    self.close()


def prefetch_to_device(
  batches: Iterable[pipeline.Batch], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
  """Yields batches on the devices, transferred one step ahead."""
  buffer: collections.deque[Any] = collections.deque()
  for batch in batches:
    buffer.append(shard_batch(batch, mesh))
    if len(buffer) > 1:
      yield buffer.popleft()
