"""Counts the code that runs from the command to a recipe's first update.

Profiles `mtv-jax train` until its first update ends, and counts the package's
functions that are called, their files and their source lines (without
docstrings and blank lines; nested functions, lambdas and comprehensions belong
to the enclosing function):

  python tools/trace_step.py --config=siglip_b16_224:tiny
  python tools/trace_step.py --config=siglip_b16_224:tiny --root=OTHER_CHECKOUT

Trains on a tar of small JPEGs with captions, without evaluations; --as_is uses
the recipe's data and evaluations. The device step is the code that runs while
JAX traces the update.
"""

import argparse
import ast
import collections
import io
import json
import os
import pathlib
import runpy
import sys
import tarfile
import tempfile
import threading

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Trace:
  """Records the code objects of a package that run until the first update."""

  def __init__(self, package, update, end):
    self.package, self.update, self.end = f"{package}/", update, end
    self.codes, self.step_codes = set(), set()
    self.depth = 0  # Depth of nested update calls.
    self.thread = threading.get_ident()

  def start(self):
    """Profiles this thread and the threads that it starts."""
    threading.setprofile(self.profile)
    sys.setprofile(self.profile)

  def profile(self, frame, event, _):
    """Records the package's code objects that are called."""
    code = frame.f_code
    if event not in ("call", "return") or not code.co_filename.startswith(
      self.package
    ):
      return
    if event == "call":
      self.codes.add(code)
    if threading.get_ident() != self.thread:
      return
    name = code.co_qualname
    if name == self.update:
      self.depth += 1 if event == "call" else -1
    if event == "call" and self.depth:
      self.step_codes.add(code)
    if event == "return" and name == self.end:
      raise Finished


class Finished(BaseException):
  """The first update is done."""


def outermost_functions(path):
  """Maps lines to (function, first line); also returns lines not to count."""
  tree = ast.parse(path.read_text())
  owners, skipped = {}, set()

  def visit(node, prefix, inside):
    for child in ast.iter_child_nodes(node):
      is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
      scope = (*prefix, getattr(child, "name", ""))
      if is_function and not inside:
        first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
        for line in range(first, child.end_lineno + 1):
          owners[line] = (".".join(scope), first)
      if is_function or isinstance(child, ast.ClassDef):
        body = child.body[0]
        if ast.get_docstring(child, clean=False) is not None:
          skipped.update(range(body.lineno, body.end_lineno + 1))
        visit(child, scope, inside or is_function)
      else:
        visit(child, prefix, inside)

  visit(tree, (), False)
  text = path.read_text().splitlines()
  skipped |= {i for i, line in enumerate(text, 1) if not line.strip()}
  return owners, skipped


def count(codes):
  """Number of lines by (file, function) of code objects."""
  functions = collections.defaultdict(int)
  files = collections.defaultdict(set)
  for code in codes:
    if pathlib.Path(code.co_filename).is_file():
      files[code.co_filename].add(code.co_firstlineno)
  for name, entered in files.items():
    owners, skipped = outermost_functions(pathlib.Path(name))
    entered = {owners[line] for line in entered if line in owners}
    for line, owner in owners.items():
      if owner in entered and line not in skipped:
        functions[name, owner[0]] += 1
  return functions


def describe(title, functions, package):
  """Prints a table by file and returns its sums."""
  by_file = collections.defaultdict(list)
  for (name, function), lines in functions.items():
    by_file[os.path.relpath(name, package)].append((function, lines))
  print(f"\n{title}\n\n| file | functions | lines |\n|---|---|---|")
  for name, rows in sorted(by_file.items()):
    print(f"| {name} | {len(rows)} | {sum(n for _, n in rows)} |")
  sums = dict(
    functions=len(functions),
    files=len(by_file),
    lines=sum(functions.values()),
    longest_function=max(functions.values(), default=0),
  )
  print(f"\n{title}: {json.dumps(sums)}")
  return sums


def write_tar(path, count=256):
  """Writes a WebDataset tar of small noise images with captions."""
  import numpy as np
  import PIL.Image

  rng = np.random.default_rng(0)
  with tarfile.open(path, "w") as tar:
    for i in range(count):
      image = io.BytesIO()
      pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
      PIL.Image.fromarray(pixels).save(image, "JPEG")
      caption = f"image number {i}".encode()
      for name, data in (("jpg", image.getvalue()), ("txt", caption)):
        member = tarfile.TarInfo(f"{i:06}.{name}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def main():
  """Profiles one start and step."""
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--config", default="siglip_b16_224:tiny")
  add("--root", type=pathlib.Path, default=ROOT, help="a checkout")
  add("--update", default=None, help="the traced update's qualified name")
  add("--end", default=None, help="the method that runs the first update")
  evals = ("zero_shot", "retrieval")
  add("--evals", nargs="*", default=evals, help="evaluations to leave out")
  add("--as_is", action="store_true", help="the recipe's data, evaluations")
  add("--functions", action="store_true", help="print every function")
  args = parser.parse_args()
  root = args.root.resolve()
  sys.path.insert(0, str(root))
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  # JAX's compilation cache would hide code that should be counted.
  os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
  trace = Trace(
    root / "mtv_jax",
    args.update or "make_update_fn.<locals>.update",
    args.end or "Trainer.update",
  )
  with tempfile.TemporaryDirectory() as workdir:
    sys.argv = [
      "mtv_jax.main",
      f"--config={args.config}",
      f"--workdir={workdir}/run",
    ]
    if not args.as_is:
      write_tar(f"{workdir}/train.tar")
      source = dict(type="webdataset", path=f"{workdir}/train.tar")
      sys.argv.append(f"--config.data.train={[source]}")
      sys.argv += [f"--config.evals.{name}=None" for name in args.evals]
    trace.start()
    try:
      runpy.run_module("mtv_jax.main", run_name="__main__")
    except Finished:
      pass
    finally:
      sys.setprofile(None)
      threading.setprofile(None)
  package = root / "mtv_jax"
  everything, step = count(trace.codes), count(trace.step_codes)
  describe("command to updated state", everything, package)
  describe("device step", step, package)
  if args.functions:
    for (name, function), lines in sorted(everything.items()):
      inside = "step" if (name, function) in step else "    "
      print(f"{lines:5} {inside} {os.path.relpath(name, package)} {function}")
  sys.stdout.flush()
  os._exit(0)  # Loader threads would wait for the unfinished run.


if __name__ == "__main__":
  main()
