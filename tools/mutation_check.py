"""Checks that changed tests still detect the mutations that old tests detected.

Samples mutations (signs, comparisons, constants, masks, seeds, error
conditions) with a fixed seed from lines that the old tests execute and that
both checkouts have. Applies each to a copy of both checkouts and runs the
mutated package's tests:

  python tools/mutation_check.py --old=OLD_CHECKOUT --packages objectives models
  python tools/mutation_check.py --old=OLD_CHECKOUT --report

--results stores finished runs, so rerunning the command resumes. A mutation is
detected if a test fails. --report prints the table, and fails if the new tests
miss a mutation that the old tests detected.
"""

import argparse
import ast
import copy
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
MARKS = ("slow", "reference", "long")  # Left out.
SWAPS = {
  ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
  ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
  ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def mutate(node):
  """Returns a node's mutated copy and the mutation's kind, or None."""
  new = copy.deepcopy(node)
  if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
    new.op = SWAPS[type(node.op)]()
    is_mask = isinstance(node.op, ast.BitAnd | ast.BitOr)
    return new, "mask" if is_mask else "sign"
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    return node.operand, "sign"
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
    return node.operand, "mask"
  if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
    new.ops[0] = SWAPS[type(node.ops[0])]()
    return new, "comparison"
  if isinstance(node, ast.BoolOp):
    new.op = SWAPS[type(node.op)]()
    return new, "comparison"
  called = isinstance(node, ast.Call) and getattr(node.func, "attr", "")
  if called == "where" and len(node.args) == 3:
    new.args[1], new.args[2] = new.args[2], new.args[1]
    return new, "mask"
  if called == "fold_in":
    new.args[1] = ast.Constant(7)
    return new, "seed"
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    new.value = node.value * 2 + 1
    return new, "constant"
  raises = isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise)
  if raises and not node.orelse:
    new.test = ast.UnaryOp(ast.Not(), node.test)
    return new, "error condition"
  return None


def candidates(path, lines):
  """Yields the mutations of a file's executed lines, as dicts."""
  source = path.read_text()
  tree = ast.parse(source)
  annotations = set()
  for node in ast.walk(tree):
    for field in ("annotation", "returns"):
      for child in ast.walk(getattr(node, field, None) or ast.Pass()):
        annotations.add(child)
  for node in ast.walk(tree):
    if node in annotations or getattr(node, "lineno", None) not in lines:
      continue
    mutated = mutate(node)
    if mutated is None:
      continue
    # An error's `if` changes only in its condition.
    old = node.test if isinstance(node, ast.If) else node
    new = mutated[0].test if isinstance(node, ast.If) else mutated[0]
    if old.lineno == old.end_lineno:
      yield dict(
        kind=mutated[1],
        line=source.splitlines()[old.lineno - 1],
        start=old.col_offset,
        end=old.end_col_offset,
        replacement=f"({ast.unparse(ast.fix_missing_locations(new))})",
        number=old.lineno,
      )


def find_line(root, line):
  """Position (path, number) of a line in the package, None unless unique."""
  found = [
    (path, i)
    for path in sorted((root / "mtv_jax").rglob("*.py"))
    for i, text in enumerate(path.read_text().splitlines())
    if text.strip() == line.strip()
  ]
  return found[0] if len(found) == 1 else None


def draw(old, new, packages, count, seed, coverage):
  """Samples `count` mutations of lines that both checkouts have."""
  executed = json.loads(coverage.read_text())["files"]
  rng, drawn = random.Random(seed), []
  pool = []
  for name, data in sorted(executed.items()):
    package = name.split("mtv_jax/")[-1].split("/")[0]
    if package in packages:
      lines = set(data["executed_lines"])
      path = old / name[name.index("mtv_jax/") :]
      pool += [(package, m) for m in candidates(path, lines)]
  by_kind = {}
  for package, mutation in pool:
    by_kind.setdefault(mutation["kind"], []).append((package, mutation))
  while len(drawn) < count and any(by_kind.values()):
    for kind in sorted(by_kind):
      while by_kind[kind]:
        pick = by_kind[kind].pop(rng.randrange(len(by_kind[kind])))
        package, mutation = pick
        places = [find_line(r, mutation["line"]) for r in (old, new)]
        if all(places) and not any(
          m["line"] == mutation["line"] for m in drawn
        ):
          drawn.append({**mutation, "package": package})
          break
      if len(drawn) == count:
        break
  return drawn


def run_tests(root, mutation, python, timeout):
  """Tests a mutated copy of a checkout; returns the first failure, or ""."""
  path, number = find_line(root, mutation["line"])
  with tempfile.TemporaryDirectory() as folder:
    clone = pathlib.Path(folder) / "clone"
    ignore = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__")
    shutil.copytree(root, clone, ignore=ignore, symlinks=True)
    target = clone / path.relative_to(root)
    lines = target.read_text().splitlines(keepends=True)
    text = lines[number]
    shift = (
      len(text)
      - len(text.lstrip())
      - (len(mutation["line"]) - len(mutation["line"].lstrip()))
    )
    start, end = mutation["start"] + shift, mutation["end"] + shift
    lines[number] = text[:start] + mutation["replacement"] + text[end:]
    target.write_text("".join(lines))
    # A line may have moved to another package.
    packages = {mutation["package"], path.relative_to(root).parts[1]}
    tests = [f"tests/{p}" for p in sorted(packages)]
    # Checkouts without a marker reject its name.
    marks = [
      m for m in MARKS if f'"{m}:' in (root / "pyproject.toml").read_text()
    ]
    command = [
      python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
      "-m", " and ".join(f"not {m}" for m in marks),
      *(t for t in tests if (clone / t).is_dir()),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(clone)}
    try:
      done = subprocess.run(
        command, cwd=clone, env=env, timeout=timeout, capture_output=True
      )
    except subprocess.TimeoutExpired:
      return "timeout"
    output = done.stdout.decode()
    if done.returncode == 4:
      raise RuntimeError(f"pytest can't run: {output}{done.stderr.decode()}")
    lines = [t for t in output.splitlines() if t[:6] in ("FAILED", "ERROR ")]
    found = done.returncode not in (0, 5)
    return (lines or ["error"])[0] if found else ""


def main():
  """Samples and runs mutations, or reports."""
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--old", type=pathlib.Path, required=True)
  add("--new", type=pathlib.Path, default=ROOT)
  add("--packages", nargs="+", default=["objectives", "models", "train"])
  add("--count", type=int, default=40)
  add("--seed", type=int, default=0)
  add("--timeout", type=int, default=900)
  add("--python", default=sys.executable)
  add("--results", type=pathlib.Path, default=pathlib.Path("mutations.json"))
  add("--report", action="store_true")
  args = parser.parse_args()
  old, new = args.old.resolve(), args.new.resolve()
  if args.results.exists():
    results = json.loads(args.results.read_text())
  else:
    coverage = args.results.with_suffix(".coverage.json")
    if not coverage.exists():
      measure_coverage(old, args.packages, coverage.resolve(), args.python)
    drawn = draw(old, new, args.packages, args.count, args.seed, coverage)
    results = dict(mutations=drawn)
  if not args.report:
    for mutation in results["mutations"]:
      for name, root in (("before", old), ("after", new)):
        if name not in mutation:
          mutation[name] = run_tests(root, mutation, args.python, args.timeout)
          args.results.write_text(json.dumps(results, indent=1))
  lost = 0
  print("| package | kind | line | mutation | before | after |")
  print("|---|---|---|---|---|---|")
  for m in results["mutations"]:
    before, after = m.get("before"), m.get("after")
    cells = [m["package"], m["kind"], m["line"].strip(), m["replacement"]]
    print("|", " | ".join([*cells, str(bool(before)), str(bool(after))]), "|")
    lost += bool(before) and not after
  print(f"{lost} of {len(results['mutations'])} found before, not after.")
  return int(lost > 0)


def measure_coverage(old, packages, path, python):
  """Writes the lines that the packages' fast tests execute as JSON."""
  tests = [f"tests/{p}" for p in packages if (old / "tests" / p).is_dir()]
  data = path.with_suffix(".data")
  run = [python, "-m", "coverage"]
  command = [
    *run, "run", f"--data-file={data}", "--source=mtv_jax", "-m", "pytest",
    "-q", "-m", "not slow and not reference", *tests,
  ]  # fmt: skip
  env = {**os.environ, "PYTHONPATH": str(old)}
  subprocess.run(command, cwd=old, env=env, check=False)
  report = [*run, "json", f"--data-file={data}", f"-o{path}", "-q"]
  subprocess.run(report, cwd=old, check=True)


if __name__ == "__main__":
  sys.exit(main())
