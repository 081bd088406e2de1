"""Labels a whole data set, on any number of hosts.

Each host labels whole shards on its own devices and claims them one by one
(see `claims`), starting at a place of its own; hosts exchange nothing but the
files in the folder of the labels. So any number of them may work on one
folder, come and go, or be killed: what they make is the same, to the byte.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

from mtv_jax.data.labels.label_writer import Entry, LabelWriter, Summary
from mtv_jax.data.sources.base import Source
from mtv_jax.experts.base import Expert
from mtv_jax.experts.labelling import batching
from mtv_jax.experts.labelling.shard_lease import Claims
from mtv_jax.parallel.mesh import HostRows
from mtv_jax.utils import atomic

log = logging.getLogger(__name__)

# Seconds between two looks at the shards that others label, which grow.
_SHORTEST, _LONGEST = 0.2, 5.0


def run(
  expert: Expert,
  base: Source,
  out: str | os.PathLike,
  *,
  host: HostRows | None = None,
  threads: int | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
  """Labels the shards that have no labels yet, and finishes the set.

  Returns when all shards are labelled, also those of other hosts: a host that
  has nothing left to do takes over those of hosts that are gone.

  Args:
    expert: makes the labels.
    base: the source, of tars or ArrayRecord files.
    out: the folder; made if needed.
    host: which of how many start at the same time, so that each begins
      elsewhere; 0 of 1 by default, which is right for hosts that are started
      by hand, too.
    threads: that decode, prepare and finish; one a core by default.
    progress: is called with the records that are done, by any host, and all.

  Raises:
    FileExistsError: the folder holds labels made with other settings.
    LabelError: no record has a label.
    ValueError: fewer than one thread.
  """
  if threads is not None and threads < 1:
    raise ValueError(f"threads={threads}; expected at least 1.")
  writer = LabelWriter(
    out, kind=expert.kind, base=base, settings=expert.settings
  )
  threads = os.cpu_count() or 1 if threads is None else threads
  claims = Claims(writer.out)
  with futures.ThreadPoolExecutor(threads) as pool:
    job = _Job(expert, writer, claims, pool, threads, progress)
    try:
      job.run(host or HostRows(0, 1))
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
  claims.sweep()
  return writer.finish()


class _Job:
  """One host's part."""

  def __init__(
    self,
    expert: Expert,
    writer: LabelWriter,
    claims: Claims,
    pool: futures.ThreadPoolExecutor,
    threads: int,
    progress: Callable[[int, int], None],
  ):
    self._expert = expert
    self._writer = writer
    self._claims = claims
    self._pool = pool
    self._threads = threads
    self._progress = progress
    self._done = 0

  def run(self, host: HostRows) -> None:
    """Returns when every shard has its labels."""
    count, wait = len(self._writer.names), _SHORTEST
    first = count * host.index // host.count
    while todo := self._todo():
      # From its own place to the end, and on from the start.
      order = [s for s in todo if s >= first] + [s for s in todo if s < first]
      taken = next((shard for shard in order if self._label(shard)), None)
      if taken is not None:
        first, wait = taken, _SHORTEST
        continue
      if wait == _SHORTEST:
        self._say_waiting(order)
      time.sleep(wait)
      wait = min(2 * wait, _LONGEST)

  def _todo(self) -> Sequence[int]:
    writer = self._writer
    todo = writer.todo()
    left = sum(len(writer.numbers(shard)) for shard in todo)
    self._done = len(writer.base) - left
    self._progress(self._done, len(writer.base))
    return todo

  def _label(self, shard: int) -> bool:
    """Labels a shard unless somebody else is at it; whether it did."""
    if self._writer.done(shard):
      return False
    with self._claims.take(self._writer.names[shard]) as taken:
      # Somebody may have finished it just before it was taken.
      if not taken or self._writer.done(shard):
        return False
      try:
        self._writer.write(shard, self._entries(shard))
      except FileNotFoundError:
        # This process slept so long that another one took the shard over and
        # cleaned up; what that one makes, or has made, is the same.
        holder = self._claims.holder(self._writer.names[shard])
        lost = holder is not None and holder.owner != atomic.current_process()
        if not (lost or self._writer.done(shard)):
          raise
      return self._writer.done(shard)

  def _entries(self, shard: int) -> Iterator[Entry]:
    total = len(self._writer.base)
    for entry in batching.label(
      self._expert,
      self._writer.base.read_with_metadata,
      self._writer.numbers(shard),
      pool=self._pool,
      threads=self._threads,
    ):
      self._done += 1
      self._progress(min(self._done, total), total)
      yield entry

  def _say_waiting(self, shards: Sequence[int]) -> None:
    names = [self._writer.names[shard] for shard in shards]
    held = [(name, self._claims.holder(name)) for name in names]
    told = [f"{name} ({claim})" for name, claim in held[:3] if claim]
    log.info(
      "Nothing is left to take: waiting for %d shards that others label: %s%s.",
      len(names),
      ", ".join(told),
      ", ..." if len(held) > 3 else "",
    )
