"""Progress bars on a terminal and in a log."""

import io

from mtv_jax.utils import progress
from mtv_jax.utils.progress import Progress


class Stream(io.StringIO):
  def __init__(self, tty):
    super().__init__()
    self.isatty = lambda: tty


def test_a_log_gets_lines_and_a_terminal_one_bar():
  log, terminal = Stream(False), Stream(True)
  for stream in (log, terminal):
    report = Progress(stream=stream, interval=0)
    for done in (400, 1500, 2000):
      report(done, 2000)
  lines = log.getvalue().splitlines()
  assert lines[0].startswith(" 20% 400 of 2,000 images, ")
  assert lines[-1].startswith("100% 2,000 of 2,000 images, ")
  assert "\r" not in log.getvalue()
  assert "\r100% |" in terminal.getvalue()


def test_lines_come_at_intervals_and_at_the_end():
  log = Stream(False)
  report = Progress(stream=log, unit="records", interval=1000)
  for done in range(101):
    report(done, 100)
  first, last = log.getvalue().splitlines()
  assert first.startswith("  0% 0 of 100 records")
  assert last.startswith("100% 100 of 100 records")


def test_track(capsys):
  assert [*progress.track("ab", "Embedding", unit="batches")] == ["a", "b"]
  assert [*progress.track([], "Nothing", unit="batches")] == []
  lines = capsys.readouterr().err.splitlines()
  assert lines[1].startswith("Embedding: 100% 2 of 2 batches")
