"""The clock against a fake one; files after a resume; the console line."""

import json
import logging
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mtv_jax.train import metrics
from mtv_jax.train.metrics import (
  WIDTH,
  Chrono,
  MetricWriter,
  Rates,
  console_line,
  format_number,
  setup_logging,
)


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def make_chrono(clock, **kwargs):
  defaults = {"total_steps": 100, "batch_size": 8, "devices": 4}
  return Chrono(clock=clock, **(defaults | kwargs))


def take_steps(chrono, clock, count, *, wait=0.25, compute=0.75):
  for _ in range(count):
    with chrono.waiting():
      clock.now += wait
    clock.now += compute
    chrono.step()


def test_metrics_imports_no_jax():
  code = "import sys, mtv_jax.train.metrics; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_chrono_excludes_compilation_and_pauses():
  clock = Clock()
  chrono = make_chrono(clock)
  take_steps(chrono, clock, 1, wait=2, compute=30)
  before = chrono.rates(1)
  assert before.images_per_second == 0 and math.isnan(before.eta)
  take_steps(chrono, clock, 5)
  with chrono.pause():
    clock.now += 1000
  take_steps(chrono, clock, 5)
  rates = chrono.rates(11)
  assert rates == Rates(
    images_per_second=8.0,
    wait=0.25,
    step_seconds=1.0,
    eta=89.0,
    core_hours=10 * 4 / 3600,
  )
  # The next window starts anew; the ETA uses the session's mean.
  take_steps(chrono, clock, 10, wait=0, compute=3)
  rates = chrono.rates(21)
  assert rates.images_per_second == pytest.approx(8 / 3)
  assert rates.wait == 0
  assert rates.eta == pytest.approx(79 * 2.0)
  times = chrono.to_dict()
  assert times == {
    "train": 40.0,
    "wait": 2.5,
    "compile": 32.0,
    "pause": 1000.0,
    "device": 160.0,
  }


def test_chrono_survives_a_resume():
  clock = Clock()
  first = make_chrono(clock)
  take_steps(first, clock, 11)
  saved = json.loads(json.dumps(first.to_dict()))
  clock.now += 10_000  # Time between sessions does not count.
  second = make_chrono(clock, devices=8)
  second.from_dict(saved)
  take_steps(second, clock, 1, wait=0, compute=5)
  take_steps(second, clock, 10, wait=0, compute=0.5)
  rates = second.rates(22)
  assert rates.core_hours == pytest.approx((10 * 4 + 5 * 8) / 3600)
  assert rates.eta == pytest.approx(78 * 0.5)
  assert second.to_dict()["compile"] == 6.0
  assert second.to_dict()["train"] == 15.0
  second.from_dict({})  # A checkpoint of an older version.
  assert second.rates(22).core_hours == 0


def test_chrono_eta_is_zero_at_the_end():
  clock = Clock()
  chrono = make_chrono(clock, total_steps=2)
  take_steps(chrono, clock, 2)
  assert chrono.rates(2).eta == 0


# --- files -------------------------------------------------------------------


def read_jsonl(folder):
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def read_board(folder):
  """(step, tag, value) of all event files, and the steps of restarts."""
  scalars, restarts = [], []
  for path in sorted(folder.glob("events*")):
    data = path.read_bytes()
    while data:
      # TFRecord: length, its checksum, the record, its checksum.
      size = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.HasField("session_log"):
        restarts.append(event.step)
      scalars += [
        (event.step, v.tag, v.simple_value) for v in event.summary.value
      ]
  return scalars, restarts


RATES = Rates(812.3, 0.012, 0.5, 192.0, 1.5)


def test_writers_write_files(tmp_path):
  with MetricWriter(tmp_path / "run", total_steps=10) as writers:
    writers.write_scalars(
      1, {"loss": np.float32(2.5), "n": np.array([3])}, RATES
    )
    writers.write_scalars(1, {"eval/top1": 0.25, "bad": float("nan")})
  rows = read_jsonl(tmp_path / "run")
  assert rows[0]["loss"] == 2.5 and rows[0]["n"] == 3
  assert rows[0]["speed/images_per_second"] == 812.3
  assert rows[1] == {"step": 1, "eval/top1": 0.25, "bad": None}
  scalars, _ = read_board(tmp_path / "run")
  assert (1, "loss", 2.5) in scalars and (1, "eval/top1", 0.25) in scalars
  assert "bad" not in [tag for _, tag, _ in scalars]


def test_resume_repeats_no_step(tmp_path):
  with MetricWriter(tmp_path, total_steps=10) as writers:
    for step in range(1, 7):
      writers.write_scalars(step, {"loss": float(step)})
  with (tmp_path / "metrics.jsonl").open("a") as f:
    f.write('{"step": 7, "lo')  # Killed while writing.
  with MetricWriter(tmp_path, total_steps=10, start_step=4) as writers:
    for step in range(5, 9):
      writers.write_scalars(step, {"loss": 10.0 * step})
  rows = read_jsonl(tmp_path)
  assert [row["step"] for row in rows] == list(range(1, 9))
  assert [row["loss"] for row in rows] == [1, 2, 3, 4, 50, 60, 70, 80]
  _, restarts = read_board(tmp_path)
  assert restarts[-1] == 5
  with MetricWriter(tmp_path, total_steps=10) as writers:
    writers.write_scalars(0, {"loss": 0.5})
  assert read_jsonl(tmp_path) == [{"step": 0, "loss": 0.5}]


def test_resume_leaves_a_complete_file_alone(tmp_path):
  with MetricWriter(tmp_path, total_steps=10) as writers:
    writers.write_scalars(3, {"loss": 1.0})
  before = (tmp_path / "metrics.jsonl").stat()
  MetricWriter(tmp_path, total_steps=10, start_step=3).close()
  after = (tmp_path / "metrics.jsonl").stat()
  assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


def test_rows_of_a_table_are_repeated_by_no_resume(tmp_path):
  values = dict(names=["a", "b"], share=1 / 3, norms=np.float32([0.1, np.nan]))
  with MetricWriter(tmp_path, total_steps=10) as writers:
    for step in (2, 4, 6):
      writers.write_row("interference", step, values)
  with MetricWriter(tmp_path, total_steps=10, start_step=5) as writers:
    writers.write_row("interference", 6, values)
  lines = (tmp_path / "interference.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row.pop("step") for row in rows] == [2, 4, 6]
  expected = dict(names=["a", "b"], share=0.3333333, norms=[0.1, None])
  assert rows == [expected] * 3
  MetricWriter(tmp_path, total_steps=10).close()
  assert not (tmp_path / "interference.jsonl").read_text()


def test_only_process_0_writes(tmp_path, caplog):
  with (
    caplog.at_level(logging.INFO),
    MetricWriter(tmp_path / "run", total_steps=10, process_index=1) as writers,
  ):
    writers.write_scalars(1, {"loss": 1.0})
    writers.write_scalars(1, {"loss": 1.0}, RATES)
  assert not (tmp_path / "run").exists() and not caplog.records


def test_a_metric_is_a_scalar(tmp_path):
  with (
    MetricWriter(tmp_path, total_steps=10) as writers,
    pytest.raises(ValueError, match=r"'grads' has shape \(2,\)"),
  ):
    writers.write_scalars(1, {"grads": np.ones(2)})


# --- the console -------------------------------------------------------------


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
