"""Memory, open files and step time of a long run, from samples of a process."""

import json
import subprocess
import sys

import pytest

from tools import soak


@pytest.mark.parametrize("leak", [0.0, 60.0])
def test_growth_is_that_after_the_first_tenth(tmp_path, leak):
  rows = [{"step": 0, "loss": 1.0}]
  rows += [
    {"step": 10 * i, "speed/step_seconds": 0.02 if i < 91 else 0.03}
    for i in range(101)
  ]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "metrics.jsonl").write_text(lines)
  samples = [
    # The first tenth loads programs; later the kernel takes back file pages.
    {"time": 5.0 + i, "mb": 100.0 + 50.0 * (i >= 10), "files": 20.0}
    for i in range(100)
  ]
  for sample in samples[50:]:
    sample["mb"] += leak
  for sample in samples[90:]:
    sample["mb"] -= 40.0
  result = soak.summarize(samples, tmp_path)
  assert result["steps"] == 1000
  assert result["memory_growth_mb"] == leak
  assert result["open_files_growth"] == 0
  assert result["step_ms_ratio"] == pytest.approx(1.5)
  names = {chart.name for chart in soak.draw(result)}
  assert names == {"soak_memory_mb", "soak_open_files", "soak_step_ms"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_files_of_a_process(monkeypatch):
  monkeypatch.setattr(soak, "_PERIOD", 0.02)
  code = (
    "import os, sys; x = b'x' * 100_000_000; f = [os.pipe() for _ in range(9)];"
    "print('ready', flush=True); sys.stdin.read()"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as process:
    assert process.stdout.readline() == b"ready\n"
    seen = []
    append = seen.append

    def end(seconds):
      append(seconds)
      if len(seen) == 3:
        process.stdin.close()
        process.wait()

    monkeypatch.setattr(soak.time, "sleep", end)
    samples = soak.watch(process)
  assert len(samples) == 3 and seen == [0.02] * 3
  assert all(s["mb"] > 100 and s["files"] >= 18 for s in samples)
