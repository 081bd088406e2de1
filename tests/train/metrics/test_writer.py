"""Files and log lines of a run: contents, resumes, unwritable disks."""

import json
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mtv_jax.train.metrics import MetricWriter, Rates, setup_logging
from mtv_jax.train.metrics.writer import WIDTH, console_line


def test_metrics_imports_no_jax():
  code = "import sys, mtv_jax.train.metrics; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def read_jsonl(folder, name="metrics"):
  text = (folder / f"{name}.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def open_writer(folder, **options):
  return MetricWriter(folder, total_steps=10, **options)


def write_losses(folder, losses, **options):
  """Writes the loss by step."""
  with open_writer(folder, **options) as writer:
    for step, loss in losses.items():
      writer.write_scalars(step, {"loss": loss})


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
  with open_writer(tmp_path / "run") as writers:
    values = {"loss": np.float32(2.5), "n": np.array([3])}
    writers.write_scalars(1, values, RATES)
    writers.write_scalars(1, {"eval/top1": 0.25, "bad": float("nan")})
  rows = read_jsonl(tmp_path / "run")
  assert rows[0]["loss"] == 2.5 and rows[0]["n"] == 3
  assert rows[0]["speed/images_per_second"] == 812.3
  assert rows[1] == {"step": 1, "eval/top1": 0.25, "bad": None}
  scalars, _ = read_board(tmp_path / "run")
  assert (1, "loss", 2.5) in scalars and (1, "eval/top1", 0.25) in scalars
  assert "bad" not in [tag for _, tag, _ in scalars]


def test_resume_repeats_no_step(tmp_path):
  write_losses(tmp_path, {step: float(step) for step in range(1, 7)})
  with (tmp_path / "metrics.jsonl").open("a") as f:
    f.write('{"step": 7, "lo')  # Killed while writing.
  losses = {step: 10.0 * step for step in range(5, 9)}
  write_losses(tmp_path, losses, start_step=4)
  rows = read_jsonl(tmp_path)
  assert [row["step"] for row in rows] == list(range(1, 9))
  assert [row["loss"] for row in rows] == [1, 2, 3, 4, 50, 60, 70, 80]
  _, restarts = read_board(tmp_path)
  assert restarts[-1] == 5
  # A complete file is not rewritten.
  before = (tmp_path / "metrics.jsonl").stat()
  open_writer(tmp_path, start_step=8).close()
  after = (tmp_path / "metrics.jsonl").stat()
  assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)
  write_losses(tmp_path, {0: 0.5})
  assert read_jsonl(tmp_path) == [{"step": 0, "loss": 0.5}]


def test_rows_of_a_table_are_repeated_by_no_resume(tmp_path):
  values = dict(names=["a", "b"], share=1 / 3, norms=np.float32([0.1, np.nan]))
  with open_writer(tmp_path) as writers:
    for step in (2, 4, 6):
      writers.write_row("interference", step, values)
  with open_writer(tmp_path, start_step=5) as writers:
    writers.write_row("interference", 6, values)
  rows = read_jsonl(tmp_path, "interference")
  assert [row.pop("step") for row in rows] == [2, 4, 6]
  expected = dict(names=["a", "b"], share=0.3333333, norms=[0.1, None])
  assert rows == [expected] * 3
  open_writer(tmp_path).close()
  assert not (tmp_path / "interference.jsonl").read_text()


def test_rows_of_skipped_batches_are_kept(tmp_path):
  first = 10**8  # Numbers of more than seven digits stay exact.
  with open_writer(tmp_path) as writers:
    for step in (2, 4, 6):
      writers.write_row("nonfinite", step, dict(batch=first + step))
  options = dict(start_step=3, keep_row=lambda row: row["batch"] == first + 4)
  with open_writer(tmp_path, **options) as writers:
    writers.write_row("nonfinite", 4, dict(batch=first + 7))
  rows = read_jsonl(tmp_path, "nonfinite")
  actual = [(row["step"], row["batch"] - first) for row in rows]
  assert actual == [(2, 2), (4, 4), (4, 7)]


def test_only_process_0_writes(tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    write_losses(tmp_path / "run", {1: 1.0}, process_index=1)
  assert not (tmp_path / "run").exists() and not caplog.records


def test_a_metric_is_a_scalar(tmp_path):
  message = r"'grads' has shape \(2,\)"
  with (
    open_writer(tmp_path) as writers,
    pytest.raises(ValueError, match=message),
  ):
    writers.write_scalars(1, {"grads": np.ones(2)})


# --- errors ------------------------------------------------------------------


def warnings(caplog):
  return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_a_full_disk_is_a_warning_and_loses_no_row(mount_disk, caplog):
  small_disk = mount_disk("64k")
  with MetricWriter(small_disk, total_steps=100) as writers:
    writers.write_scalars(1, {"loss": 1.0})
    ballast = small_disk / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
      while True:
        file.write(bytes(100))
    # More than is left of the last page.
    for step in range(2, 60):
      writers.write_scalars(step, {f"metric_{i}": i / 7 for i in range(10)})
      writers.write_row("interference", step, {"norms": np.arange(20) / 7})
    text = (small_disk / "metrics.jsonl").read_text()
    assert text.endswith("\n") and json.loads(text.splitlines()[-1])
    found = warnings(caplog)
    assert sorted(w.split(";")[0] for w in found) == [
      f"Metrics can't be written to {name}"
      for name in ("interference.jsonl", "jsonl", "tensorboard")
    ]
    assert all("No space left" in w for w in found)
    assert len([*small_disk.glob("events*")]) == 1
    ballast.unlink()
    writers.write_scalars(60, {"loss": 2.0})
    writers.write_row("interference", 60, {"norms": [1.0]})
  assert [row["step"] for row in read_jsonl(small_disk)] == [*range(1, 61)]
  rows = read_jsonl(small_disk, "interference")
  assert [row["step"] for row in rows] == [*range(2, 61)]
  assert len(warnings(caplog)) == 6  # And "written again".


def test_a_deleted_folder_is_a_warning(tmp_path, caplog):
  folder, moved = tmp_path / "run", tmp_path / "moved"
  with MetricWriter(folder, total_steps=10) as writers:
    writers.write_scalars(1, {"loss": 1.0})
    folder.rename(moved)
    writers.write_scalars(2, {"loss": 2.0})
    writers.write_scalars(3, {"loss": 3.0})
    assert len(warnings(caplog)) == 2 and not folder.exists()
    moved.rename(folder)
    writers.write_scalars(4, {"loss": 4.0})
  assert [row["loss"] for row in read_jsonl(folder)] == [1, 2, 3, 4]
  scalars, _ = read_board(folder)
  assert (1, "loss", 1.0) in scalars and (4, "loss", 4.0) in scalars


def test_a_truncated_row_is_repaired_by_the_next(tmp_path):
  with MetricWriter(tmp_path, total_steps=10) as writers:
    writers.write_scalars(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as f:
      f.write('{"step": 2, "lo')
    writers.write_scalars(2, {"loss": 2.0})
  assert [row["loss"] for row in read_jsonl(tmp_path)] == [1, 2]


def test_a_row_is_in_the_file_before_its_line_is_logged(tmp_path):
  seen = []

  class Reader(logging.Handler):
    def emit(self, record):
      seen.append([row["step"] for row in read_jsonl(tmp_path)])

  logger, reader = logging.getLogger("mtv_jax.train.metrics.writer"), Reader()
  level = logger.level
  logger.addHandler(reader)
  logger.setLevel(logging.INFO)
  try:
    write_losses(tmp_path, {1: 1.0, 2: 1.0})
  finally:
    logger.removeHandler(reader)
    logger.setLevel(level)
  assert seen == [[1], [1, 2]]


def test_a_killed_process_loses_no_row(tmp_path):
  code = f"""
import os, signal
from mtv_jax.train.metrics import MetricWriter
writers = MetricWriter({str(tmp_path)!r}, total_steps=10)
for step in range(1, 4):
  writers.write_scalars(step, dict(loss=float(step)))
os.kill(os.getpid(), signal.SIGKILL)
"""
  subprocess.run([sys.executable, "-c", code])
  assert [row["loss"] for row in read_jsonl(tmp_path)] == [1, 2, 3]
  scalars, _ = read_board(tmp_path)
  assert [value for _, _, value in scalars] == [1, 2, 3]


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
