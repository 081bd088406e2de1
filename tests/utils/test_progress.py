"""Progress bars on a terminal and in a log."""

import functools
import io
import sys

import pytest

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


def test_track(capsys):
  assert [*progress.track("ab", "Embedding", unit="batches")] == ["a", "b"]
  assert [*progress.track([], "Nothing", unit="batches")] == []
  lines = capsys.readouterr().err.splitlines()
  assert lines[1].startswith("Embedding: 100% 2 of 2 batches")
