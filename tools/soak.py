"""Soak test: memory, open files and step time of a long run of small steps.

  python tools/soak.py --config=mtv_tiny:tiny --steps=20000 --output=runs/soak

Trains in a separate process, and samples its resident memory and open files
once per second. Prints the largest growth after the second tenth of the run,
and writes soak.json and charts/*.svg. Linux only.

Exit status: 0 if memory grows by less than 50 MB and open files do not grow.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

from mtv_jax.cli import arguments
from mtv_jax.cli.main import run_module
from mtv_jax.report.charts import Series, line_chart, thin_out, to_file
from mtv_jax.train.runtime.supervisor import launch
from mtv_jax.utils import atomic

_PERIOD = 1.0
_MAX_GROWTH = 50.0  # MB


def run(
  recipe: arguments.ConfigFlags, *, steps: int = 20_000, output: pathlib.Path
) -> int:
  """Trains OUTPUT/run, writes soak.json and charts; returns the exit status.

  Args:
    steps: number of train steps.
    output: folder to write.
  """
  (process,) = launch(
    recipe.config,
    output / "run",
    [*recipe.set, f"total_steps={steps}"],
    log=output / "run.log",
  )
  samples = watch(process)
  if code := process.wait():
    print(f"The run failed with exit code {code}.")
    return 1
  result = summarize(samples, output / "run")
  atomic.write_text(output / "soak.json", json.dumps(result, indent=1) + "\n")
  (output / "charts").mkdir(exist_ok=True)
  for chart in draw(result):
    path = output / "charts" / f"{chart.name}.svg"
    atomic.write_text(path, to_file(chart))
  for name in ("memory_growth_mb", "open_files_growth", "step_ms_ratio"):
    print(f"{name}: {result[name]:.3g}")
  flat = result["memory_growth_mb"] < _MAX_GROWTH
  return int(not flat or result["open_files_growth"] > 0)


def watch(process: subprocess.Popen) -> list[dict[str, float]]:
  """Samples a process's memory and open files every second until it exits."""
  samples = []
  folder = pathlib.Path("/proc", str(process.pid))
  while process.poll() is None:
    try:
      pages = int((folder / "statm").read_text().split()[1])
      files = len(os.listdir(folder / "fd"))
    except (OSError, IndexError):  # The process has just exited.
      break
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    samples.append({"time": time.time(), "mb": memory, "files": files})
    time.sleep(_PERIOD)
  return samples


def summarize(
  samples: list[dict[str, float]], workdir: pathlib.Path
) -> dict[str, Any]:
  """The samples, and their growth after the first tenth of the run."""
  text = (workdir / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  rows = [row for row in rows if "speed/step_seconds" in row]
  steps = [(r["step"], 1e3 * r["speed/step_seconds"]) for r in rows[1:]]
  # Shares of the run's time approximate shares of its steps.
  first, last = samples[0]["time"], samples[-1]["time"]
  for sample in samples:
    sample["share"] = (sample["time"] - first) / (last - first)
  warm = [s for s in samples if s["share"] >= 0.1]
  tenth = max(len(warm) // 10, 1)

  def growth(name):
    # Uses the maximum because the kernel may reclaim file pages in between.
    first, *later = (
      statistics.median(s[name] for s in warm[i : i + tenth])
      for i in range(0, len(warm) - tenth, tenth)
    )
    return max(later) - first

  times = [ms for _, ms in steps]
  tenth = max(len(times) // 10, 1)
  return {
    "steps": rows[-1]["step"],
    "memory_growth_mb": growth("mb"),
    "open_files_growth": growth("files"),
    "step_ms_ratio": statistics.median(times[-tenth:])
    / statistics.median(times[tenth : 2 * tenth]),
    "memory_mb": [(100 * s["share"], s["mb"]) for s in samples],
    "open_files": [(100 * s["share"], s["files"]) for s in samples],
    "step_ms": steps,
  }


def draw(result: dict[str, Any]) -> list:
  """Charts of memory, open files and step time."""
  time_label = "share of the run's time (%)"
  charts = [
    ("memory_mb", "resident memory (MB)", time_label),
    ("open_files", "open files", time_label),
    ("step_ms", "step (ms)", "step"),
  ]
  return [
    line_chart(
      title,
      [Series("", thin_out(result[name]))],
      name=f"soak_{name}",
      x_label=x_label,
    )
    for name, title, x_label in charts
  ]


if __name__ == "__main__":
  sys.exit(run_module("soak", sys.modules[__name__]))
