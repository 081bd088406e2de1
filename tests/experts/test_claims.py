"""Who labels which shard: claims, left ones, and who takes them over."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from labelling_samples import ELSEWHERE, claim

from mtv_jax.data import atomic
from mtv_jax.experts import claims
from mtv_jax.experts.claims import Claims


def dead_owner():
  """A process of this machine that was."""
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  mine = atomic.me()
  return atomic.Owner(mine.machine, process.pid, mine.token)


def test_a_claim_is_exclusive_and_let_go_of(tmp_path):
  mine = Claims(tmp_path)
  with mine.take("a") as taken, mine.take("a") as again, mine.take("b") as b:
    assert (taken, again, b) == (True, False, True)
    assert str(mine.holder("a")).startswith(f"process {os.getpid()} on ")
  assert mine.holder("a") is None
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("owner", "age", "gone"),
  [
    (dead_owner(), 0, True),
    (ELSEWHERE, 0, False),
    (ELSEWHERE, 200, False),
    (ELSEWHERE, 400, True),
    # A container's only process has the number 1 every time.
    (atomic.Owner(atomic.me().machine, os.getpid(), "00000000"), 0, True),
    ("damaged", 0, False),
    ("damaged", 400, True),
  ],
)
def test_claims_of_processes_that_are_gone(tmp_path, owner, age, gone):
  file = claim(tmp_path, "00001", owner, age=age)
  halves = [
    tmp_path / f".{name}.{owner}.3.tmp"
    for name in ("00001.array_record", "00001_stats.json", "000011.keys.npy")
  ]
  for half in halves:
    half.touch()
    os.utime(half, (time.time() - age,) * 2)
  with Claims(tmp_path).take("00001") as taken:
    assert taken == gone
  assert file.exists() != gone
  if owner != "damaged":
    assert [half.exists() for half in halves] == [not gone, not gone, True]
    Claims(tmp_path).sweep()
    assert (list(tmp_path.iterdir()) == []) == gone


def test_a_claim_that_was_taken_over_meanwhile_is_put_back(
  tmp_path, monkeypatch
):
  file = claim(tmp_path, "a", dead_owner())
  is_left = atomic.is_left

  def slow(path, owner):
    result = is_left(path, owner)
    # Somebody else is faster.
    claim(tmp_path, "a", ELSEWHERE)
    return result

  monkeypatch.setattr(claims.atomic, "is_left", slow)
  with Claims(tmp_path).take("a") as taken:
    assert not taken
  assert json.loads(file.read_text())["owner"] == str(ELSEWHERE)
  assert [f.name for f in tmp_path.iterdir()] == [".a.claim"]


def test_of_many_that_take_over_one_wins(tmp_path):
  claim(tmp_path, "a", ELSEWHERE, age=1000)
  start, wins = threading.Barrier(8), []
  end = threading.Barrier(8)

  def contend():
    start.wait()
    with Claims(tmp_path).take("a") as taken:
      wins.append(taken)
      end.wait()

  threads = [threading.Thread(target=contend) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(wins) == [False] * 7 + [True]


def test_a_claim_is_touched_while_it_is_held(tmp_path, monkeypatch):
  monkeypatch.setattr(atomic, "STALE", 0.2)
  with Claims(tmp_path).take("a"):
    os.utime(tmp_path / ".a.claim", (0, 0))
    time.sleep(0.3)
    assert atomic.age(tmp_path / ".a.claim") < 10
    # One that was lost is not touched, and not let go of.
    file = claim(tmp_path, "a", ELSEWHERE, age=1000)
    os.replace(file, tmp_path / "other")
    os.replace(tmp_path / "other", file)
    moved = tmp_path / "moved"
    moved.write_bytes(file.read_bytes())
    os.replace(moved, file)
    os.utime(file, (0, 0))
    time.sleep(0.1)
    assert file.stat().st_mtime == 0
  assert file.exists()
