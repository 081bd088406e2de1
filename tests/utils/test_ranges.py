"""Ranges that are read ahead, and their eviction."""

import pickle
import threading
import time
import types
from concurrent import futures
from multiprocessing import util

import pytest

from mtv_jax.utils import buckets, ranges
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import StorageError
from mtv_jax.utils.ranges import ByteRange, RangeReader, RangeServer

SPANS = [ByteRange(path_lib.as_path("gs://b/x"), i, 1) for i in range(40)]


@pytest.fixture
def reads(monkeypatch):
  """Offsets of the requests to a store."""
  offsets = []

  def read(key, byte_range):
    offsets.append(byte_range.start)
    stamp = types.SimpleNamespace(generation=b"1")
    done = futures.Future()
    done.set_result(
      types.SimpleNamespace(state="value", value=b"x", stamp=stamp)
    )
    return done

  store = types.SimpleNamespace(read=read)
  monkeypatch.setattr(buckets, "open_store", lambda path: (store, "x"))
  return offsets


@pytest.mark.parametrize("workers", [False, True])
def test_reads_ahead_when_memory_is_full(workers, reads, monkeypatch):
  monkeypatch.setattr(ranges, "_USED_UP", 0.0)
  server = RangeServer(8) if workers else RangeReader(8)
  client = pickle.loads(pickle.dumps(server)) if workers else server
  for epoch in range(2):
    for i in range(0, 40, 2):
      client.prefetch(SPANS[i : i + 4])
      client.get(SPANS[i])
      deadline = time.monotonic() + 30
      while len(reads) < min(epoch * 40 + i + 4, epoch * 40 + 40):
        assert time.monotonic() < deadline
        time.sleep(0.01)
      client.get(SPANS[i + 1])
  assert len(reads) == 80
  server.close()


def test_ranges_in_use_stay(reads):
  reader = RangeReader(4)
  for _ in range(3):
    reader.prefetch(SPANS[:8])
    for span in SPANS[:4]:
      reader.get(span)
  assert reads == [0, 1, 2, 3]


def test_a_memory_too_small_for_the_ranges_in_use_is_logged_once(reads, caplog):
  reader = RangeReader(4)
  for span in SPANS[:8]:
    reader.get(span)
  assert not caplog.records
  for span in SPANS[:8] * 2:
    reader.get(span)
  assert [r.getMessage() for r in caplog.records] == [
    "Blocks are read again, because blocks in use exceed the 4 B of"
    " data.block_memory: raise it, or lower data.window."
  ]


def test_a_closed_server_has_no_thread():
  before = set(threading.enumerate())
  server = RangeServer(8)
  (thread,) = set(threading.enumerate()) - before
  server.close()
  server.close()
  thread.join(10)
  assert not thread.is_alive()


def test_a_temporary_folder_with_a_long_path(tmp_path, monkeypatch):
  monkeypatch.setattr(util, "get_temp_dir", lambda: str(tmp_path / ("x" * 99)))
  with pytest.raises(StorageError, match=r"Set TMPDIR to .* a short path"):
    RangeServer(0)
