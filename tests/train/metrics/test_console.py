"""Log lines, and metrics as one line."""

import logging
import math
import re

import pytest

from mtv_jax.train import metrics
from mtv_jax.train.metrics import (
  Rates,
  console_line,
  format_number,
  setup_logging,
)
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


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0.0, "0"),
    (96.0, "96"),
    (3.41234, "3.412"),
    (-0.4312, "-0.431"),
    (1234.56, "1234.6"),
    (8.1e-4, "8.1e-04"),
    (-2.5e7, "-2.5e+07"),
    (math.inf, "inf"),
    (math.nan, "nan"),
  ],
)
def test_format_number(value, text):
  assert format_number(value) == text


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.2, "0s"),
    (59.6, "1m00s"),
    (192.0, "3m12s"),
    (18_420.0, "5h07m"),
    (183_600.0, "2d03h"),
    (math.nan, "?"),
  ],
)
def test_format_duration(seconds, text):
  assert metrics.format_duration(seconds) == text


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
