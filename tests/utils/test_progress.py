"""How far a long job is: what a log and a terminal are told."""

import io

from mtv_jax.utils.progress import Progress


class Stream(io.StringIO):
  def __init__(self, tty):
    super().__init__()
    self.isatty = lambda: tty


def test_progress():
  now = 0.0
  log, screen = Stream(False), Stream(True)
  says = [Progress(stream=s, clock=lambda: now) for s in (log, screen)]
  # 400 were there; the first 100 compile; then 50 a second.
  for seconds, done in (
    (1.0, 400), (31.0, 500), (33.0, 600), (51.0, 1500), (52.0, 1900),
    (60.0, 2000),
  ):  # fmt: skip
    now = seconds
    for say in says:
      say(done, 2000)
  assert log.getvalue().splitlines() == [
    "25.0%, 500 of 2,000 images, 3.3 a second, eta 7m30s",
    "75.0%, 1,500 of 2,000 images, 50 a second, eta 10s",
    "100.0%, 2,000 of 2,000 images, 52 a second",
  ]
  lines = screen.getvalue().split("\r")
  assert lines[0] == " 20.0% [####................] 400 of 2,000 images  eta ?"
  assert lines[-1].startswith("100.0% [####################] 2,000 of 2,000")
  assert lines[-1].endswith("\n")
