"""Size and speed of two checkouts, as ratios measured in one run.

  python ratios.py size --old OLD --new NEW
  python ratios.py speed --old OLD --new NEW --python PYTHON [--rounds=5]

`size` counts lines, docstring lines and AST nodes of each package; recipes
(`configs/`) are not counted. `speed` runs both checkouts in turn, in processes
of one environment and without a compile cache, and reports medians:

  import    seconds of a Python process that runs `from mtv_jax import load`
  first     seconds of a run of `mtv_tiny` of one step: import, build, compile
  step      seconds of a step of `mtv_tiny`: `speed/step_seconds`
"""

import argparse
import ast
import collections
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

TRAIN = (
  "-m", "mtv_jax.main", "--config=configs/mtv_tiny.py", "--compile_cache=none",
  "--config.evals=none", "--config.log.every_steps=10",
)  # fmt: skip
DEFINITIONS = (
  ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef,
)  # fmt: skip


def count_file(text: str) -> tuple[int, int, int]:
  """Lines, lines of docstrings, AST nodes."""
  tree = ast.parse(text)
  nodes = list(ast.walk(tree))
  docstrings = 0
  for node in nodes:
    if isinstance(node, DEFINITIONS) and ast.get_docstring(node) is not None:
      docstrings += node.body[0].end_lineno - node.body[0].lineno + 1
  return text.count("\n"), docstrings, len(nodes)


def count_packages(checkout: pathlib.Path) -> dict[str, list[int]]:
  """Counts of each package of `mtv_jax`; '.' for the root's modules."""
  totals = collections.defaultdict(lambda: [0, 0, 0])
  for file in sorted((checkout / "mtv_jax").rglob("*.py")):
    parts = file.relative_to(checkout / "mtv_jax").parts
    if parts[0] == "configs":
      continue
    package = parts[0] if len(parts) > 1 else "."
    for name in (package, "total"):
      for i, count in enumerate(count_file(file.read_text())):
        totals[name][i] += count
  return totals


def report_size(old: pathlib.Path, new: pathlib.Path) -> None:
  """Prints a Markdown table of both checkouts."""
  before, after = count_packages(old), count_packages(new)
  names = [n for n in sorted({*before, *after}) if n != "total"]
  print("| package | lines before | lines after |\n|---|---|---|")
  for name in [*names, "total"]:
    rows = [c[name][0] if name in c else 0 for c in (before, after)]
    print(f"| `{name}` | {rows[0]:,} | {rows[1]:,} |")
  for label, counts in (("before", before), ("after", after)):
    lines, docstrings, nodes = counts["total"]
    print(
      f"{label}: {nodes:,} AST nodes, docstrings {docstrings / lines:.1%} of"
      " the lines"
    )
  print(f"AST nodes: {after['total'][2] / before['total'][2]:.3f}")


def run(python: str, checkout: pathlib.Path, *arguments: str) -> float:
  """Seconds of a Python process in a checkout."""
  env = {**os.environ, "PYTHONPATH": str(checkout)}
  env.pop("JAX_COMPILATION_CACHE_DIR", None)
  start = time.perf_counter()
  done = subprocess.run(
    [python, *arguments], cwd=checkout, env=env, capture_output=True, text=True
  )
  if done.returncode:
    sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
  return time.perf_counter() - start


def measure(
  python: str, checkout: pathlib.Path, steps: int
) -> dict[str, float]:
  """The figures of one round of one checkout."""
  seconds = {"import": run(python, checkout, "-c", "from mtv_jax import load")}
  folder = pathlib.Path(tempfile.mkdtemp())
  try:
    for name, total in (("first", 1), ("step", steps)):
      workdir = folder / name
      arguments = (f"--workdir={workdir}", f"--config.total_steps={total}")
      seconds[name] = run(python, checkout, *TRAIN, *arguments)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    key = "speed/step_seconds"
    logged = [json.loads(line) for line in lines]
    seconds["step"] = statistics.median(
      [row[key] for row in logged if key in row][1:]
    )
  finally:
    shutil.rmtree(folder)
  return seconds


def report_speed(
  python: str, old: pathlib.Path, new: pathlib.Path, rounds: int, steps: int
) -> None:
  """Prints medians of both checkouts and their ratios."""
  figures = {"old": collections.defaultdict(list), "new": None}
  figures["new"] = collections.defaultdict(list)
  for i in range(rounds):
    order = [("old", old), ("new", new)]
    for name, checkout in order if i % 2 else reversed(order):
      for key, value in measure(python, checkout, steps).items():
        figures[name][key].append(value)
  for key in figures["old"]:
    a, b = (statistics.median(figures[name][key]) for name in ("old", "new"))
    ratios = [
      y / x
      for x, y in zip(figures["old"][key], figures["new"][key], strict=True)
    ]
    print(
      f"{key:8s} old {a:.3f} s, new {b:.3f} s, new/old"
      f" {statistics.median(ratios):.3f}"
      f" ({min(ratios):.3f} to {max(ratios):.3f})"
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=("size", "speed"))
  parser.add_argument("--old", type=pathlib.Path, required=True)
  parser.add_argument("--new", type=pathlib.Path, required=True)
  parser.add_argument("--python", default=sys.executable)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=80)
  args = parser.parse_args()
  old, new = args.old.resolve(), args.new.resolve()
  if args.what == "size":
    report_size(old, new)
  else:
    report_speed(args.python, old, new, args.rounds, args.steps)


if __name__ == "__main__":
  main()
