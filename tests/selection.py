"""Selects the test files of a run, by markers and imports."""

import ast
import functools
import itertools
import pathlib
from collections.abc import Iterator

from _pytest.mark.expression import Expression

TESTS = pathlib.Path(__file__).resolve().parent
MARKERS = ("slow", "reference", "long")
# The newest Python is tested for releases of these.
JAX = ("jax", "flax", "optax", "orbax")
# Their tests reach JAX through packages that have tests of their own.
ABOVE_JAX = ("cli", "config", "configs", "hostile", "report", "studies")


def may_have(path: pathlib.Path, expression: str) -> bool:
  """Whether a test of the file may match the expression of `-m`."""
  sources = [path, *(p for p in imported(path) if TESTS in p.parents)]
  text = "".join(source.read_text(encoding="utf-8") for source in sources)
  present = [name for name in MARKERS if f"mark.{name}" in text]
  matches = Expression.compile(expression).evaluate
  return any(
    matches(lambda name, marks=marks, **_: name in marks)
    for count in range(len(present) + 1)
    for marks in itertools.combinations(present, count)
  )


def depends_on_jax(path: pathlib.Path) -> bool:
  """Whether the file, or a module that it imports, imports JAX."""
  if path.relative_to(TESTS).parts[0] in ABOVE_JAX:
    return False
  return any(
    name.partition(".")[0] in JAX
    for source in (path, *imported(path))
    for name in _imports(source)
  )


def first_cases(items: list) -> list:
  """The first case of each parametrized test."""
  first: dict = {}
  for item in items:
    first.setdefault(item.nodeid.partition("[")[0], item)
  return [*first.values()]


@functools.cache
def imported(path: pathlib.Path) -> frozenset[pathlib.Path]:
  """Files of the project that a file imports; helpers of tests with theirs."""
  found: set[pathlib.Path] = set()
  for name in _imports(path):
    base = TESTS.parent if name.startswith("mtv_jax") else TESTS
    stem = base.joinpath(*name.split("."))
    for file in (stem.with_suffix(".py"), stem / "__init__.py"):
      if file.is_file() and file != path:
        found.add(file)
        if base == TESTS:
          found |= imported(file)
  return frozenset(found)


@functools.cache
def _imports(path: pathlib.Path) -> frozenset[str]:
  """Dotted names that a file imports, at any level of it."""

  def names() -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
      elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)

  return frozenset(names())
