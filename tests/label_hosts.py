"""Simulated hosts that write one label set, of which one is lost.

python tests/label_hosts.py BASE OUT LOG HOSTS LOST

Forks processes with the identities of different machines, and kills the one
that labels record number LOST of all. Every labelled record is a line of LOG.
"""

import contextlib
import os
import pathlib
import signal
import sys
import time
from unittest import mock

import label_samples

from mtv_jax.data.labels import label_writer
from mtv_jax.data.labels.label_sets import hash_bytes
from mtv_jax.data.labels.label_writer import Entry, LabelWriter
from mtv_jax.data.sources import base as sources_base
from mtv_jax.utils import atomic

PART, BLOCK = 8, 4
STALE = 4.0  # Seconds; a loaded machine renews late.
_DELAY = 0.02  # Seconds per record.


def write(base, out, *, log=os.devnull, host=0, delay=0.0):
  """Writes the set that every host writes a part of."""
  with (
    mock.patch.object(label_writer, "PART_RECORDS", PART),
    mock.patch.object(sources_base, "LANE_BLOCK", BLOCK),
  ):
    _write(base, out, log, host, delay)


def _write(base, out, log, host, delay):
  source = label_samples.open_base(pathlib.Path(base))
  writer = LabelWriter(
    out, kind="depth", base=source, settings={}, check=host == 0
  )
  with open(log, "ab", buffering=0) as lines:

    def make_entries(numbers):
      for number in numbers:
        time.sleep(delay)
        record = source[number]
        lines.write(b"%d %d\n" % (host, number))
        outcome = label_samples.outcome("depth", number)
        yield Entry(record["key"], outcome, hash_bytes(record["image"]))

    label_writer.write_all(writer, make_entries)


def main(base, out, log, hosts, lost):
  """Returns an exit status."""
  atomic.STALE_SECONDS = STALE
  pids = []
  for host in range(int(hosts)):
    if pid := os.fork():
      pids.append(pid)
      continue
    owner = atomic.Owner(f"{host:08x}", os.getpid(), "00000000")
    atomic.current_process = lambda owner=owner: owner
    write(base, out, log=log, host=host, delay=_DELAY)
    os._exit(0)
  while len(lines := read_log(log)) <= int(lost):
    if os.waitpid(-1, os.WNOHANG)[0]:
      for pid in pids:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
      return 1  # A host ended before the loss.
    time.sleep(0.001)
  victim = lines[-1][0]
  os.kill(pids[victim], signal.SIGKILL)
  failed = [os.waitpid(pid, 0)[1] != 0 for pid in pids]
  return 0 if failed == [host == victim for host in range(len(pids))] else 1


def read_log(log):
  """Returns host and number of each labelled record."""
  with open(log, "ab+") as file:
    file.seek(0)
    lines = [line for line in file if line.endswith(b"\n")]
  return [tuple(map(int, line.split())) for line in lines]


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
