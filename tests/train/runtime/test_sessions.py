"""run.json and the liveness file."""

import json
import os
import subprocess

import pytest

import mtv_jax
from mtv_jax.train.runtime import sessions
from mtv_jax.train.runtime.sessions import Session, read_alive, read_sessions

DEVICES = {"device_kind": "cpu", "devices": 1, "processes": 1}


def start(folder, step=0, **options):
  return Session(folder, start_step=step, devices=DEVICES, **options)


def test_each_session_is_recorded(tmp_path):
  folder = tmp_path / "a_run"
  with start(folder, command="mtv-jax train") as session:
    assert read_sessions(folder)[0]["ended"] is None
    for step in range(1, 4):
      session.report(step)
  with pytest.raises(ValueError), start(folder, 2) as session:
    session.report(5)
    raise ValueError("a defect\nof two lines")
  content = json.loads((folder / "run.json").read_text())
  assert content["name"] == "a_run"
  first, second = content["sessions"]
  assert (first["start_step"], first["last_step"]) == (0, 3)
  assert first["exit"] == "finished" and first["command"] == "mtv-jax train"
  assert first["started"] <= first["ended"] <= second["started"]
  assert first["packages"]["mtv_jax"] == mtv_jax.__version__
  assert {"jax", "flax", "grain", "numpy"} <= first["packages"].keys()
  assert first["device_kind"] == "cpu" and first["host"]
  assert (second["start_step"], second["last_step"]) == (2, 5)
  assert second["exit"] == "ValueError: a defect"


def test_the_longest_compilation_of_the_same_objectives_is_expected(tmp_path):
  for seconds in (40.0, 2.0):  # The second one read the cache.
    with start(tmp_path) as session:
      session.record_compilation(["depth", "dino"], seconds)
  with start(tmp_path) as session:
    assert session.estimate_compilation(["depth", "dino"]) == 40
    assert session.estimate_compilation(["depth"]) is None


@pytest.mark.parametrize(
  "content", ["", "[]", "{", '{"a', '{"sessions": 3}', '{"sessions": [3, "x"]}']
)
@pytest.mark.parametrize("alive", [None, "{"])
def test_other_content_of_run_json_is_replaced(tmp_path, content, alive):
  (tmp_path / "run.json").write_text(content)
  if alive is None:
    (tmp_path / "alive").mkdir()
  else:
    (tmp_path / "alive").write_text(alive)
  with start(tmp_path):
    pass
  (session,) = read_sessions(tmp_path)
  assert session["exit"] == "finished"


def test_a_killed_session_ends_where_it_was_last_alive(tmp_path, monkeypatch):
  session = start(tmp_path)
  session.report(7, "evaluate knn")  # A new activity is written immediately.
  session.report(7, "train")
  session.report(8, "train")  # Too early.
  alive = read_alive(tmp_path)
  assert (alive["step"], alive["activity"]) == (7, "train")
  assert alive["process"] == os.getpid()
  with start(tmp_path, 4):
    pass
  killed, _ = read_sessions(tmp_path)
  assert killed["exit"] == "without a report"
  assert killed["last_step"] == 7 and killed["ended"] == alive["time"]
  monkeypatch.setattr(sessions, "ALIVE_SECONDS", 0.0)
  session.report(9, "train")  # After the interval.
  assert read_alive(tmp_path)["step"] == 9


def test_only_process_0_writes(tmp_path):
  with start(tmp_path / "run", process_index=1) as session:
    session.report(3, "train")
  assert not (tmp_path / "run").exists()


def test_files_that_cannot_be_written_are_a_warning(tmp_path, caplog):
  folder, moved = tmp_path / "run", tmp_path / "moved"
  with start(folder) as session:
    folder.rename(moved)
    session.report(1, "train")
    session.report(1, "evaluate knn")
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    moved.rename(folder)
    session.report(2, "train")
  assert read_alive(folder)["step"] == 2
  assert read_sessions(folder)[0]["last_step"] == 2


def test_the_revision_is_that_of_the_checkout(tmp_path, monkeypatch):
  def git(*arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
      ["git", "-C", str(tmp_path), *identity, *arguments],
      capture_output=True,
      text=True,
      check=True,
    )
    return done.stdout.strip()

  monkeypatch.delenv("MTV_JAX_REVISION", raising=False)
  package = tmp_path / "package"
  package.mkdir()
  (package / "__init__.py").write_text("")
  monkeypatch.setattr(mtv_jax, "__file__", str(package / "__init__.py"))
  assert sessions.code_revision() == mtv_jax.__version__  # No repository.
  git("init", "-q")
  assert sessions.code_revision() == mtv_jax.__version__  # Not tracked.
  git("add", ".")
  git("commit", "-q", "-m", "a")
  assert sessions.code_revision() == git("rev-parse", "HEAD")
  (package / "__init__.py").write_text("# changed")
  assert sessions.code_revision() == git("rev-parse", "HEAD") + "-dirty"
  monkeypatch.setenv("MTV_JAX_REVISION", "abc123")  # As in an image.
  assert sessions.code_revision() == "abc123"
