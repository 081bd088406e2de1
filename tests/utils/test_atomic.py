"""Atomic writes, and removal of abandoned temporary files."""

import os
import subprocess
import sys
import threading

import pytest

from mtv_jax.utils import atomic
from mtv_jax.utils.atomic import Owner


def test_write_replaces_the_file_or_leaves_it_unchanged(tmp_path, monkeypatch):
  file = tmp_path / "a"
  atomic.write(file, b"1")
  atomic.write(file, b"2")
  assert file.read_bytes() == b"2"

  def reject(source, target):
    raise OSError(28, "No space left on device", str(target))

  monkeypatch.setattr(os, "replace", reject)
  with pytest.raises(OSError, match="No space"):
    atomic.write(file, b"3")
  assert [f.name for f in tmp_path.iterdir()] == ["a"]
  assert file.read_bytes() == b"2"


@pytest.mark.parametrize("links", [True, False])
def test_write_if_absent_has_one_winner(tmp_path, monkeypatch, links):
  if not links:

    def reject(source, target):
      raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", reject)
  assert atomic.write_if_absent(tmp_path / "a", b"1") == b"1"
  assert atomic.write_if_absent(tmp_path / "a", b"2") == b"1"
  assert [f.name for f in tmp_path.iterdir()] == ["a"]
  if not links:
    return
  barrier, contents = threading.Barrier(8), []

  def contend(number):
    barrier.wait()
    contents.append(atomic.write_if_absent(tmp_path / "b", b"%d" % number))

  threads = [threading.Thread(target=contend, args=[i]) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert contents == [contents[0]] * 8


def test_owners():
  mine = atomic.current_process()
  assert Owner.parse(str(mine)) == mine and not mine.is_dead
  assert Owner.parse("x") is None and Owner.parse("a-b-c") is None
  # Another machine's processes are not visible.
  assert not Owner("00000000", 999_999_999, "0").is_dead
  assert not Owner(mine.machine, os.getppid(), "0").is_dead
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  assert Owner(mine.machine, process.pid, "0").is_dead
  # An earlier process with the same id.
  assert Owner(mine.machine, mine.pid, "0").is_dead


def test_a_fork_is_another_owner():
  read, write = os.pipe()
  mine = atomic.current_process()
  code = (
    "import os; from mtv_jax.utils import atomic; me = atomic.current_process;"
    "a = me(); child = os.fork();"
    "print(me(), flush=True) if not child else os.waitpid(child, 0);"
    "child and print(a, atomic.Owner.parse(str(a)) == me())"
  )
  os.close(read)
  os.close(write)
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  child, parent, same = done.stdout.split()
  assert same == "True" and child != parent
  assert Owner.parse(child).machine == mine.machine
  assert Owner.parse(child).token != Owner.parse(parent).token


def test_remove_abandoned(tmp_path):
  mine = atomic.current_process()
  gone = Owner(mine.machine, mine.pid, "00000000")
  far = Owner("00000000", 1, "00000000")
  files = {
    "mine": atomic.temporary_path(tmp_path / "a.json"),
    "gone": tmp_path / f".a.json.{gone}.0.tmp",
    "gone too": tmp_path / f".b.json.{gone}.0.tmp",
    "far": tmp_path / f".a.json.{far}.0.tmp",
    "far and old": tmp_path / f".a.json.{far}.1.tmp",
    "another's": tmp_path / ".a.json.17.tmp",
    "no temporary": tmp_path / "a.json",
  }
  for file in files.values():
    file.touch()
  for name in ("far and old", "mine", "another's", "no temporary"):
    os.utime(files[name], (0, 0))
  assert atomic.remove_abandoned(tmp_path, name="a.") == 2
  assert {name for name, file in files.items() if not file.exists()} == {
    "gone", "far and old",
  }  # fmt: skip
  assert atomic.remove_abandoned(tmp_path) == 1
  assert not files["gone too"].exists()
