"""Time until a training prints its first line and its first step.

  python tools/first_step.py siglip_b16_224 mtv_b16_224

Starts `RECIPE:tiny` twice, each in a new workdir: first with an empty folder of
compiled programs, then with the filled one. Prints a Markdown table: seconds of
wall and processor time, and the lines before the first step. Without names, all
recipes that have `:tiny`.
"""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def main(names: list[str]) -> None:
  cells = "first line, s", "first step, s", "processor, s", "lines"
  print("|", " | ".join(("recipe", "cache", *cells)))
  print("|---|---|---|---|---|---")
  for name in names or list_recipes():
    with tempfile.TemporaryDirectory() as folder:
      for cache in ("cold", "warm"):
        times = measure(name, pathlib.Path(folder), cache)
        print(f"| {name} | {cache} | {times}", flush=True)


def list_recipes() -> list[str]:
  files = sorted(CONFIGS.glob("*.py"))
  return [f.stem for f in files if re.search(r"\btiny\b", f.read_text())]


def measure(recipe: str, folder: pathlib.Path, session: str) -> str:
  """Trains until the first step; returns the cells of a row."""
  command = [sys.executable, "-m", "mtv_jax.main", f"--config={recipe}:tiny"]
  command += [f"--workdir={folder / session}", "--config.evals={}"]
  command += [f"--compile_cache={folder / 'compiled'}"]
  options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  start, first, count = time.monotonic(), None, 0
  with subprocess.Popen(command, **options) as process:
    for line in process.stdout:
      first = first or time.monotonic() - start
      if re.search(r"\] step +1/", line):
        wall, cpu = time.monotonic() - start, processor_seconds(process.pid)
        # The programs are stored once they are compiled.
        process.terminate()
        process.communicate()
        return f"{first:.1f} | {wall:.1f} | {cpu:.1f} | {count}"
      count += 1
  return f"exit code {process.returncode}: {line.strip()} | | |"


def processor_seconds(pid: int) -> float:
  """Processor time of a process and its running and ended children."""
  ticks, tasks = 0, pathlib.Path(f"/proc/{pid}/task")
  with contextlib.suppress(FileNotFoundError):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    ticks = sum(map(int, fields.split()[11:15]))
  seconds = ticks / os.sysconf("SC_CLK_TCK")
  with contextlib.suppress(FileNotFoundError):
    for task in tasks.iterdir():
      for child in (task / "children").read_text().split():
        seconds += processor_seconds(int(child))
  return seconds


if __name__ == "__main__":
  main(sys.argv[1:])
