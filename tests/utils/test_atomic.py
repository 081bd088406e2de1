"""Atomic writes, and removal of abandoned temporary files."""

import os
import subprocess
import sys
import threading

import pytest

from mtv_jax.utils import atomic
from mtv_jax.utils.atomic import Owner
from mtv_jax.utils.threads import map_threads


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
  # Writes that fail for lack of space don't name a file themselves.
  with (
    pytest.raises(OSError, match=r"space left on device: .*/a'"),
    atomic.replace_file(file),
  ):
    raise OSError(28, "No space left on device")


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
  barrier = threading.Barrier(8)

  def contend(number):
    barrier.wait()
    return atomic.write_if_absent(tmp_path / "b", b"%d" % number)

  assert len(set(map_threads(contend, range(8)))) == 1


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
  # An earlier process with this id.
  assert Owner(mine.machine, mine.pid, "0").is_dead


def test_a_fork_is_another_owner():
  mine = atomic.current_process()
  code = (
    "import os; from mtv_jax.utils import atomic; me = atomic.current_process;"
    "a = me(); child = os.fork();"
    "print(me(), flush=True) if not child else os.waitpid(child, 0);"
    "child and print(a, atomic.Owner.parse(str(a)) == me())"
  )
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
  atomic.remove_abandoned(tmp_path, name="a.")
  assert {name for name, file in files.items() if not file.exists()} == {
    "gone", "far and old",
  }  # fmt: skip
  atomic.remove_abandoned(tmp_path)
  assert not files["gone too"].exists()


def test_pipes_and_links_are_written_to(tmp_path):
  target = tmp_path / "target"
  target.write_bytes(b"old")
  (tmp_path / "link").symlink_to(target)
  atomic.write(tmp_path / "link", b"new")
  assert (tmp_path / "link").is_symlink() and target.read_bytes() == b"new"
  os.mkfifo(tmp_path / "pipe")
  reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
  atomic.write(tmp_path / "pipe", b"x")
  assert os.read(reader, 2) == b"x"
  os.close(reader)


def _write_folder(folder, names, **options):
  with atomic.replace_folder(folder, **options) as new:
    for name in names:
      (new / name).write_text(str(new.name))


@pytest.mark.parametrize("exchange", [True, False])
def test_replace_folder(tmp_path, monkeypatch, exchange):
  if not exchange:
    monkeypatch.setattr(atomic, "_RENAME_EXCHANGE", 1 << 20)  # EINVAL
  folder = tmp_path / "a" / "out"
  _write_folder(folder, ["x", "y"], replaced={"x", "y"})
  assert {p.name for p in folder.iterdir()} == {"x", "y"}
  (folder / "mine").mkdir()
  (folder / "mine" / "z").write_text("mine")
  (folder / "mine" / "z").chmod(0o640)
  _write_folder(folder, ["x"], replaced={"x", "y"})
  assert {p.name for p in folder.iterdir()} == {"x", "mine"}
  assert (folder / "mine" / "z").stat().st_mode & 0o777 == 0o640
  old = (folder / "x").read_text()
  with pytest.raises(TypeError):
    _write_folder(folder, ["x", 1])
  assert (folder / "x").read_text() == old
  assert os.listdir(tmp_path / "a") == ["out"]


@pytest.mark.parametrize("replaced", [True, False])
def test_a_kill_between_two_renames_loses_no_folder(tmp_path, replaced):
  """If folders can't be exchanged: after the first or the second rename."""
  folder = tmp_path / "out"
  dead = atomic.current_process()._replace(pid=10**7)
  live = atomic.temporary_path(folder).with_suffix(".old")
  old = tmp_path / f".out.{dead}.0.old"
  for path in (old, live):
    _write_folder(path, ["x"])
  if replaced:
    _write_folder(folder, ["x"])
  else:
    with atomic.replace_folder(folder) as new:
      assert (folder / "x").exists()
      (new / "y").touch()
    assert {p.name for p in folder.iterdir()} == {"x", "y"}
  assert {p.name for p in tmp_path.iterdir()} == {"out", live.name}


def test_outputs_honour_the_umask(tmp_path):
  old = os.umask(0o027)
  try:
    _write_folder(tmp_path / "out", ["x"])
    atomic.write(tmp_path / "file", b"1")
  finally:
    os.umask(old)
  modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("out", "file")]
  assert modes == [0o750, 0o640]
  assert (tmp_path / "out" / "x").stat().st_mode & 0o777 == 0o640


def test_a_killed_process_leaves_the_old_folder(tmp_path):
  folder = tmp_path / "out"
  _write_folder(folder, ["x"])
  old = (folder / "x").read_text()
  code = (
    "import pathlib, sys, time; from mtv_jax.utils import atomic\n"
    "with atomic.replace_folder(pathlib.Path(sys.argv[1])) as new:\n"
    "  (new / 'x').write_text('half'); print('ready', flush=True)\n"
    "  time.sleep(60)"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE
  )
  assert process.stdout.readline() == b"ready\n"
  process.kill()
  process.wait()
  process.stdout.close()
  assert (folder / "x").read_text() == old
  (left,) = (p for p in tmp_path.iterdir() if p != folder)
  assert atomic.is_temporary(left) and (left / "x").read_text() == "half"
  _write_folder(folder, ["x"])
  assert (folder / "x").read_text() != old
  assert os.listdir(tmp_path) == ["out"]
