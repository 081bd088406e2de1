"""Progress bars on a terminal and in a log."""

import functools
import io
import os
import sys
import time
import types

import pytest

from mtv_jax.cli.main import run_command, run_module
from mtv_jax.utils import progress
from mtv_jax.utils.progress import Progress


@pytest.mark.parametrize("tty", [False, True])
def test_a_log_gets_lines_and_a_terminal_one_bar(tty, monkeypatch):
  stream = io.StringIO()
  stream.isatty = lambda: tty
  monkeypatch.setattr(sys, "stderr", stream)
  report = Progress()
  report._make_bar = functools.partial(report._make_bar, mininterval=0)
  for done in (400, 1500, 2000):
    report(done, 2000)
  text = stream.getvalue()
  if tty:
    assert "\r100% |" in text
    return
  lines = text.splitlines()
  assert lines[0].startswith(" 20% 400 of 2,000 images, ")
  assert lines[-1].startswith("100% 2,000 of 2,000 images, ") and len(lines) > 2
  assert "\r" not in text


def test_lines_come_at_intervals_and_at_the_end(capsys):
  report = Progress(unit="records")
  for done in range(101):
    report(done, 100)
  first, last = capsys.readouterr().err.splitlines()
  assert first.startswith("  0% 0 of 100 records")
  assert last.startswith("100% 100 of 100 records")


@pytest.mark.parametrize("tty", [False, True])
def test_no_command_is_silent_for_long(tty, monkeypatch, tmp_path):
  """A line per interval, on a terminal and in a file."""

  def run() -> None:
    for _ in progress.track([1], "short", unit="steps"):
      pass
    with progress.activity("compiling the step"):
      time.sleep(0.4)
    for _ in progress.track("abcd", "encode", unit="batches"):
      time.sleep(0.2)

  monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", 0.1)
  command = types.ModuleType("command")
  command.run = run
  reader, writer = os.openpty() if tty else (None, tmp_path / "log")
  with open(writer, "w") as stream:
    monkeypatch.setattr(sys, "stderr", stream)
    assert stream.isatty() == tty
    run_module("study", command, [])
    text = os.read(reader, 10_000).decode() if tty else ""
  text = text or writer.read_text()
  assert "study: compiling the step, 0s" in text
  assert tty or "of 4 batches" in text
  assert "short" not in text


def test_the_first_line_precedes_slow_imports(capsys, monkeypatch):
  monkeypatch.delitem(sys.modules, "mtv_jax.cli.score_vqa", raising=False)
  with pytest.raises(SystemExit):
    run_command("score_vqa", [])
  assert capsys.readouterr().err.startswith("score_vqa: starting\n")
