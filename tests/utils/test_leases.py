"""Leases: exclusive, expiring, taken over by one process."""

import contextlib
import errno
import json
import os
import sys
import threading
import time

import numpy as np
import pytest
from labelling_samples import ELSEWHERE, claim

from mtv_jax.utils import atomic, leases, path
from mtv_jax.utils.leases import FileLeases, ObjectLeases, open_leases
from mtv_jax.utils.threads import map_threads

# A process that no longer exists, and an earlier one with this one's number,
# as a container's only process always has.
DEAD = atomic.current_process()._replace(pid=10**7)
EARLIER = atomic.current_process()._replace(token="00000000")


def test_a_lease_is_exclusive_and_released(tmp_path):
  mine = FileLeases(tmp_path)
  with (
    mine.acquire("a") as taken,
    mine.acquire("a") as again,
    mine.acquire("b") as b,
  ):
    assert (taken, again, b) == (True, False, True)
    assert str(mine.holder("a")).startswith(f"process {os.getpid()} on ")
  assert mine.holder("a") is None
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("owner", "age", "gone"),
  [
    (DEAD, 0, True),
    (EARLIER, 0, True),
    (ELSEWHERE, 0, False),
    (ELSEWHERE, 200, False),
    (ELSEWHERE, 400, True),
    ("damaged", 0, False),
    ("damaged", 400, True),
  ],
)
def test_leases_of_dead_processes_expire(tmp_path, owner, age, gone):
  file = claim(tmp_path, "00001", owner, age=age)
  halves = [
    tmp_path / f".{name}.{owner}.3.tmp"
    for name in ("00001.array_record", "00001_stats.json", "000011.keys.npy")
  ]
  for half in halves:
    half.touch()
    os.utime(half, (time.time() - age,) * 2)
  with FileLeases(tmp_path).acquire("00001") as taken:
    assert taken == gone
  assert file.exists() != gone
  if owner != "damaged":
    assert [half.exists() for half in halves] == [not gone, not gone, True]
    FileLeases(tmp_path).clear()
    assert (list(tmp_path.iterdir()) == []) == gone


def test_release_leaves_the_lease_of_another_process(tmp_path, monkeypatch):
  file = claim(tmp_path, "a", DEAD)
  is_left = atomic.is_abandoned

  def slow(path, owner):
    result = is_left(path, owner)
    # Another process takes the lease first.
    claim(tmp_path, "a", ELSEWHERE)
    return result

  monkeypatch.setattr(leases.atomic, "is_abandoned", slow)
  with FileLeases(tmp_path).acquire("a") as taken:
    assert not taken
  assert json.loads(file.read_text())["owner"] == str(ELSEWHERE)
  assert [f.name for f in tmp_path.iterdir()] == [".a.claim"]


def test_a_check_before_a_takeover_grants_nothing_after_it(
  tmp_path, monkeypatch
):
  """A third process fails to lease at every line of the second one."""
  claim(tmp_path, "a", DEAD)
  is_left = atomic.is_abandoned
  granted, tried = [], []

  def slow(path, owner):
    result = is_left(path, owner)
    monkeypatch.setattr(leases.atomic, "is_abandoned", is_left)
    granted.append(faster.enter_context(FileLeases(tmp_path).acquire("a")))
    return result

  def at_line(frame, event, _):
    if frame.f_code.co_filename != leases.__file__:
      return None
    if event == "line" and granted:
      sys.settrace(None)
      with FileLeases(tmp_path).acquire("a") as third:
        tried.append(third)
      sys.settrace(at_line)
    return at_line

  monkeypatch.setattr(leases.atomic, "is_abandoned", slow)
  before = sys.gettrace()
  with contextlib.ExitStack() as faster:
    sys.settrace(at_line)
    try:
      with FileLeases(tmp_path).acquire("a") as taken:
        sys.settrace(before)
        assert not taken
    finally:
      sys.settrace(before)
    assert granted == [True] and len(tried) > 3 and not any(tried)
    assert len(names(tmp_path)) == 1
    assert FileLeases(tmp_path).holder("a").owner == atomic.current_process()
  assert names(tmp_path) == []


@pytest.mark.parametrize("owner", [DEAD, ELSEWHERE, "damaged"])
def test_takeover_of_an_interrupted_takeover(tmp_path, owner):
  # The last of the three died before it could remove the rest.
  old = 0 if isinstance(owner, atomic.Owner) and owner.is_dead else 400
  claim(tmp_path, "a", DEAD)
  for end in ("claim.1", "claim.12"):
    os.replace(claim(tmp_path, "b", owner, age=old), tmp_path / f".a.{end}")
  # A lease of another shard with a similar name.
  claim(tmp_path, "a.claim", ELSEWHERE)
  with FileLeases(tmp_path).acquire("a") as taken:
    assert taken
    assert names(tmp_path) == [".a.claim.13", ".a.claim.claim"]
    assert FileLeases(tmp_path).holder("a").owner == atomic.current_process()
    with FileLeases(tmp_path).acquire("a") as again:
      assert not again
  assert names(tmp_path) == [".a.claim.claim"]


def names(folder):
  return sorted(file.name for file in folder.iterdir())


def test_a_takeover_is_valid_without_the_first_lease(tmp_path):
  file = claim(tmp_path, "a", ELSEWHERE)
  os.replace(file, tmp_path / ".a.claim.1")
  with FileLeases(tmp_path).acquire("a") as taken:
    assert not taken
  assert str(FileLeases(tmp_path).holder("a")) == "process 1 on there"
  os.utime(tmp_path / ".a.claim.1", (0, 0))
  FileLeases(tmp_path).clear()
  assert names(tmp_path) == []


def test_an_unwritable_lease_is_released(tmp_path, monkeypatch):
  def full(handle, data):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(leases.os, "write", full)
  with (
    pytest.raises(OSError, match="No space"),
    FileLeases(tmp_path).acquire("a"),
  ):
    pass
  assert names(tmp_path) == []


def test_one_of_many_takeovers_wins(tmp_path):
  """Repeated, since a race shows once in hundreds of times."""
  rounds, many = 150, 8
  for number in range(rounds):
    claim(tmp_path, f"{number}", ELSEWHERE, age=1000)
  barrier = threading.Barrier(many, timeout=60)

  def contend(_):
    wins = []
    for number in range(rounds):
      barrier.wait()
      with FileLeases(tmp_path).acquire(f"{number}") as taken:
        wins.append(taken)
        barrier.wait()
    return wins

  wins = map_threads(contend, range(many))
  assert np.sum(wins, axis=0).tolist() == [1] * rounds
  assert names(tmp_path) == []


def test_a_lease_is_renewed(tmp_path, monkeypatch):
  monkeypatch.setattr(atomic, "STALE_SECONDS", 0.2)
  with FileLeases(tmp_path).acquire("a"):
    os.utime(tmp_path / ".a.claim", (0, 0))
    time.sleep(0.3)
    assert atomic.seconds_since_modified(tmp_path / ".a.claim") < 10
    # A lost lease is neither renewed nor released.
    other = claim(tmp_path, "other", ELSEWHERE)
    file = other.rename(tmp_path / ".a.claim")
    os.utime(file, (0, 0))
    time.sleep(0.1)
    assert file.stat().st_mtime == 0
  assert file.exists()


@pytest.mark.slow
def test_leases_in_a_bucket(bucket, monkeypatch):
  """Acquired, renewed, taken over and released by generation."""
  monkeypatch.setattr(atomic, "STALE_SECONDS", 1.0)
  folder = path.as_path(f"{bucket}/leases")

  def content():
    return path.read_bytes(folder / ".a.claim")

  mine = open_leases(folder)
  with mine.acquire("a") as taken, mine.acquire("a") as again:
    assert (taken, again) == (True, False)
    first = content()
    time.sleep(0.5)
    assert content() != first  # Renewed.
    assert str(mine.holder("a")).startswith(f"process {os.getpid()} on ")
  assert path.list_folder(folder) == []
  # Of a process that is known to be dead; that could live; that was silent.
  for owner, wait, gone in (
    (DEAD, 0, True),
    (ELSEWHERE, 0, False),
    ("damaged", 1.2, True),
  ):
    data = json.dumps({"host": "there", "owner": str(owner)}).encode()
    path.write_bytes(folder / ".a.claim", data)
    with mine.acquire("a") as taken:
      assert taken == (gone and not wait)
    time.sleep(wait)
    with mine.acquire("a") as taken:
      assert taken == gone
      if taken:
        # A lost lease is neither renewed nor released.
        path.write_bytes(folder / ".a.claim", data)
        time.sleep(0.3)
    assert content() == data
    path.remove(folder / ".a.claim")


@pytest.mark.slow
def test_one_of_many_processes_writes(bucket):
  folder, many = path.as_path(f"{bucket}/contended"), 8
  barrier = threading.Barrier(many, timeout=60)

  def contend(number):
    barrier.wait()
    with ObjectLeases(folder).acquire("a") as taken:
      barrier.wait()
    written = path.write_if_absent(folder / "b", b"%d" % number)
    return taken, written

  taken, written = zip(*map_threads(contend, range(many)), strict=True)
  assert sum(taken) == 1 and len(set(written)) == 1
