"""Labels a data set with an expert, on any number of hosts.

The source reads a record; `Expert.prepare` converts its image to arrays;
`Expert.run` runs the model on a batch (`batching.py`); `Expert.finish` converts
the outputs to a label (`data/labels/label_values.py`), which `LabelWriter`
writes.

Hosts lease whole shards one by one (`utils/leases.py`), and communicate only
through files in the label set's folder. Hosts may join, leave or be killed: the
label set is byte-identical.
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence

from mtv_jax.data.labels.label_writer import Entry, LabelCounts, LabelWriter
from mtv_jax.data.sources.base import Source
from mtv_jax.experts.base import Expert
from mtv_jax.experts.labelling import batching
from mtv_jax.parallel.mesh import HostRows
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.leases import Leases
from mtv_jax.utils.threads import available_cores

log = logging.getLogger(__name__)

# Seconds between checks of shards that peers are labelling, doubling.
_MIN_WAIT, _MAX_WAIT = 0.2, 5.0


def run(
  expert: Expert,
  base: Source,
  out: str | os.PathLike,
  *,
  host: HostRows | None = None,
  threads: int | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> LabelCounts:
  """Labels unlabelled shards and completes the label set.

  Returns when hosts have labelled all shards; idle hosts take over shards of
  dead hosts. `host` lets hosts that start together begin with different shards;
  the default, also for hosts started by hand, is 0 of 1. `threads` decode and
  prepare; default: one per core. `progress` receives the number of records done
  by all hosts and the total. Raises FileExistsError for labels with different
  settings, LabelError if all records lack a label.
  """
  threads = count_threads(threads)
  options = {"kind": expert.kind, "settings": expert.settings}
  writer = LabelWriter(out, base=base, **options)
  leases = Leases(writer.out)
  job = _HostJob(expert, writer, leases, threads, progress)
  job.run(host or HostRows(0, 1))
  leases.sweep()
  return writer.finish()


def count_threads(threads: int | None) -> int:
  """`threads`, or one per core; raises InputError below 1."""
  if threads is not None and threads < 1:
    raise InputError(f"threads={threads}; expected at least 1.")
  return threads or available_cores()


@dataclasses.dataclass
class _HostJob:
  """The labelling loop of one host."""

  expert: Expert
  writer: LabelWriter
  leases: Leases
  threads: int
  progress: Callable[[int, int], None]
  done: int = 0

  def run(self, host: HostRows) -> None:
    """Labels shards until all are labelled, by any host."""
    count, wait = len(self.writer.names), _MIN_WAIT
    first = count * host.index // host.count
    while todo := self._todo():
      # Starts at this host's first shard and wraps around.
      order = sorted(todo, key=lambda shard: (shard < first, shard))
      labelled = next((shard for shard in order if self._label(shard)), None)
      if labelled is not None:
        first, wait = labelled, _MIN_WAIT
        continue
      if wait == _MIN_WAIT:
        self._log_waiting(order)
      time.sleep(wait)
      wait = min(2 * wait, _MAX_WAIT)

  def _todo(self) -> Sequence[int]:
    todo, total = self.writer.todo(), len(self.writer.base)
    self.done = total - sum(len(self.writer.numbers(s)) for s in todo)
    self.progress(self.done, total)
    return todo

  def _label(self, shard: int) -> bool:
    """Labels a shard unless another process has leased or finished it."""
    if self.writer.is_done(shard):
      return False
    name = self.writer.names[shard]
    with self.leases.acquire(name) as acquired:
      # A peer may have finished it just before.
      if not acquired or self.writer.is_done(shard):
        return False
      try:
        with contextlib.closing(self._entries(shard)) as entries:
          self.writer.write(shard, entries)
      except FileNotFoundError:
        # A peer took over the shard while this process was suspended.
        holder = self.leases.holder(name)
        lost = holder is not None and holder.owner != atomic.current_process()
        if not (lost or self.writer.is_done(shard)):
          raise
      return self.writer.is_done(shard)

  def _entries(self, shard: int) -> Iterator[Entry]:
    base, numbers = self.writer.base, self.writer.numbers(shard)
    for entry in batching.label(
      self.expert, base, numbers, threads=self.threads
    ):
      self.done += 1
      self.progress(min(self.done, len(base)), len(base))
      yield entry

  def _log_waiting(self, shards: Sequence[int]) -> None:
    names = [self.writer.names[shard] for shard in shards]
    holders = [(name, self.leases.holder(name)) for name in names[:3]]
    some = [f"{name} ({lease})" for name, lease in holders if lease]
    some += ["..."] * (len(names) > 3)
    log.info(
      "No shard is left to lease: waiting for %d shards of other hosts: %s.",
      len(names),
      ", ".join(some),
    )
