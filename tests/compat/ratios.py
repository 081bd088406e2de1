"""Size and speed of two checkouts, as ratios measured in one run.

  python ratios.py size --old OLD --new NEW
  python ratios.py speed --old OLD --new NEW --cache CACHE --rounds=3
  python ratios.py program --old OLD --new NEW

`size` counts lines, docstring lines and AST nodes of each package; recipes
(`configs/`) are not counted. `speed` runs both checkouts in turn, in processes
of one environment, and reports medians:

  import    seconds of a Python process that runs `from mtv_jax import load`
  first     seconds of a run of `mtv_tiny` of one step: import, build, compile
  step      seconds of a step of `mtv_tiny`: `speed/step_seconds`; compiled
            programs are kept in CACHE for the next round

`program` counts the operations of the step's optimised program, by opcode: if
they are equal, so is the time of a step, however noisy the machine.
"""

import argparse
import ast
import collections
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from mtv_jax.perf import hlo

TRAIN = (
  "-m", "mtv_jax.main", "--config=configs/mtv_tiny.py", "--config.evals=none",
  "--config.log.every_steps=10",
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


def run(
  python: str, checkout: pathlib.Path, *arguments: str, **variables: str
) -> float:
  """Seconds of a Python process in a checkout."""
  env = {**os.environ, "PYTHONPATH": str(checkout), **variables}
  env.pop("JAX_COMPILATION_CACHE_DIR", None)
  start = time.perf_counter()
  done = subprocess.run(
    [python, *arguments], cwd=checkout, env=env, capture_output=True, text=True
  )
  if done.returncode:
    sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
  return time.perf_counter() - start


FIGURES = ("import", "first", "step")


def measure(
  figure: str, args: argparse.Namespace, checkout: pathlib.Path
) -> float:
  """Seconds of one of `FIGURES` of a checkout."""
  if figure == "import":
    return run(args.python, checkout, "-c", "from mtv_jax import load")
  with tempfile.TemporaryDirectory() as folder:
    steps, cache = (
      (1, "none") if figure == "first" else (args.steps, args.cache)
    )
    seconds = run(
      args.python,
      checkout,
      *TRAIN,
      f"--workdir={folder}/run",
      f"--config.total_steps={steps}",
      f"--compile_cache={cache}",
    )
    if figure == "first":
      return seconds
    lines = pathlib.Path(folder, "run/metrics.jsonl").read_text().splitlines()
  key = "speed/step_seconds"
  logged = [json.loads(line) for line in lines]
  return statistics.median([row[key] for row in logged if key in row][1:])


def report_speed(args: argparse.Namespace) -> None:
  """Prints medians of both checkouts and of the ratios of the rounds."""
  for figure in args.only:
    rounds = []
    for i in range(args.rounds):
      order = (args.old, args.new) if i % 2 else (args.new, args.old)
      seconds = {path: measure(figure, args, path) for path in order}
      rounds.append((seconds[args.old], seconds[args.new]))
    old, new = (statistics.median(x) for x in zip(*rounds, strict=True))
    ratios = [b / a for a, b in rounds]
    print(
      f"{figure:8s} old {old:.3f} s, new {new:.3f} s, new/old"
      f" {statistics.median(ratios):.3f}"
      f" ({min(ratios):.3f} to {max(ratios):.3f})",
      flush=True,
    )


def count_opcodes(
  python: str, checkout: pathlib.Path
) -> collections.Counter[str]:
  """Operations of the optimised program of a step of `mtv_tiny`."""
  with tempfile.TemporaryDirectory() as folder:
    run(
      python,
      checkout,
      *TRAIN,
      f"--workdir={folder}/run",
      "--config.total_steps=1",
      "--compile_cache=none",
      XLA_FLAGS=f"--xla_dump_to={folder}/hlo --xla_dump_hlo_as_text"
      " --xla_dump_hlo_module_re=jit_update",
    )
    (file,) = pathlib.Path(folder, "hlo").glob("*after_optimizations.txt")
    text = file.read_text()
  return collections.Counter(
    instruction.opcode
    for computation in hlo.parse(text).computations.values()
    for instruction in computation.values()
  )


def report_program(args: argparse.Namespace) -> None:
  """Prints the counts of both checkouts and the opcodes that differ."""
  old, new = (count_opcodes(args.python, d) for d in (args.old, args.new))
  for name, counts in (("old", old), ("new", new)):
    parts = [f"{counts[k]:,} {k}" for k in ("fusion", "dot", "reduce", "copy")]
    print(f"{name}: {counts.total():,} operations, {', '.join(parts)}")
  differing = [k for k in sorted({*old, *new}) if old[k] != new[k]]
  print("opcodes that differ:", ", ".join(differing) or "none")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=("size", "speed", "program"))
  parser.add_argument("--old", type=pathlib.Path, required=True)
  parser.add_argument("--new", type=pathlib.Path, required=True)
  parser.add_argument("--python", default=sys.executable)
  parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES)
  parser.add_argument("--cache", default="none")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=60)
  args = parser.parse_args()
  args.old, args.new = args.old.resolve(), args.new.resolve()
  if args.what == "size":
    report_size(args.old, args.new)
  elif args.what == "speed":
    report_speed(args)
  else:
    report_program(args)


if __name__ == "__main__":
  main()
