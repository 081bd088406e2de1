"""Log lines, and metrics as one line."""

import logging
import os
import re
import subprocess
import sys

import pytest

from mtv_jax.train.metrics import Rates, console_line, setup_logging
from mtv_jax.train.metrics.console import WIDTH

RATES = Rates(812.3, 0.012, 0.5, 192.0, 1.5)


def test_console_line():
  numbers = {"loss": 3.4121, "contrastive": 3.4121, "lr": 8.1e-4}
  assert console_line(120, 2000, numbers, rates=RATES) == (
    "step  120/2000   6.0%  loss 3.412  contrastive 3.412  lr 8.1e-04"
    "  812 img/s  wait 1%  eta 3m12s"
  )
  assert console_line(2000, 2000, {}) == "step 2000/2000 100.0%"


def test_console_line_fits_its_width():
  numbers = {f"grad_norm/{i}": 1.234 for i in range(30)}
  line = console_line(999_999, 1_000_000, numbers, rates=RATES)
  assert len(line) <= WIDTH
  assert line.startswith("step  999999/1000000  99.9%  grad_norm/0 1.234")
  assert "+28 more  812 img/s" in line and line.endswith("eta 3m12s")


def test_setup_logging(capsys):
  package = logging.getLogger("mtv_jax")
  state = package.handlers[:], package.level, package.propagate
  levels = {n: logging.getLogger(n).level for n in ("absl", "jax", "orbax")}
  try:
    setup_logging()
    setup_logging()  # A second call repeats no line.
    logging.getLogger("mtv_jax.train.metrics").info("a line")
    logging.getLogger("absl").info("noise")
    setup_logging(process_index=1)
    logging.getLogger("mtv_jax.train.metrics").info("from another process")
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"I \d{4} \d\d:\d\d:\d\d \S+:0\] a line", line)
  finally:
    package.handlers[:], package.level, package.propagate = state
    for name, level in levels.items():
      logging.getLogger(name).setLevel(level)


# A command that logs, and exits with another code than 0 and 1.
COMMAND = r"""
import logging
from mtv_jax.cli import errors
from mtv_jax.train.metrics import setup_logging
from mtv_jax.train.runtime import preemption
with errors.readable_errors("train"):
  setup_logging()
  for i in range(3):
    logging.getLogger("mtv_jax.train").info("r\xf6w \udce9")
  raise preemption.Preempted("received SIGTERM")
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
@pytest.mark.parametrize("output", ["full disk", "closed pipe", "closed"])
def test_output_that_cannot_be_written_changes_no_exit_code(output):
  if output == "full disk":
    fd = os.open("/dev/full", os.O_WRONLY)
  else:
    reader, fd = os.pipe()
    os.close(reader)
  command = [sys.executable, "-c", COMMAND]
  if output == "closed":
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
  try:
    done = subprocess.run(command, stdout=fd, stderr=fd, timeout=60)
  finally:
    os.close(fd)
  assert done.returncode == 143


def test_characters_that_the_output_lacks_are_escaped():
  env = {**os.environ, "PYTHONIOENCODING": "ascii"}
  done = subprocess.run(
    [sys.executable, "-c", COMMAND],
    env=env,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 143, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 3
  assert all(line.endswith(r"r\xf6w \udce9") for line in lines)
