#!/usr/bin/env python3
"""Lists functions and methods of the package without references.

A private function needs a reference in the package; a public one in the
package, recipes, tools, tests or docs. References are matched by name: names,
attributes and words in strings, outside the function's own definition. Methods
of classes with a foreign base class are exempt, since libraries may call them.
"""

import ast
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
_WORD = re.compile(r"\w+")


def references(tree: ast.AST) -> Iterator[str]:
  """Names that the code refers to, including words in strings."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Name):
      yield node.id
    elif isinstance(node, ast.Attribute):
      yield node.attr
    elif isinstance(node, ast.alias):
      yield node.name.rpartition(".")[2]
    elif isinstance(node, ast.keyword) and node.arg:
      yield node.arg
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield from _WORD.findall(node.value)


def definitions(
  body: list[ast.stmt], classes: set[str], *, is_foreign: bool = False
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
  """Functions and methods at any level, except methods that libraries call."""
  for node in body:
    if isinstance(node, FUNCTIONS):
      is_ours = node.name.startswith("_") or not is_foreign
      if is_ours and not re.fullmatch("__.*__", node.name):
        yield node
    elif isinstance(node, ast.ClassDef):
      bases = {
        base.attr
        if isinstance(base, ast.Attribute)
        else getattr(base, "id", "")
        for base in node.bases
      }
      foreign = bool(bases - classes - {"object", "Protocol", "NamedTuple"})
      yield from definitions(node.body, classes, is_foreign=foreign)
    elif isinstance(node, ast.If):
      yield from definitions(node.body + node.orelse, classes)


def without_docstrings(tree: ast.Module) -> ast.Module:
  """Removes docstrings from a module."""
  for node in ast.walk(tree):
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
      first.value.value = None
  return tree


def find_unused(root: pathlib.Path) -> list[str]:
  """One line for each function or method without references."""
  package = {
    path: without_docstrings(ast.parse(path.read_text(encoding="utf-8")))
    for path in sorted((root / "mtv_jax").rglob("*.py"))
  }
  used = Counter(n for tree in package.values() for n in references(tree))
  outside: Counter[str] = Counter()
  for folder in ("configs", "tools", "tests", "docs"):
    for path in (root / folder).rglob("*.*"):
      if path.suffix in (".py", ".md"):
        outside.update(_WORD.findall(path.read_text(encoding="utf-8")))
  outside.update(_WORD.findall((root / "README.md").read_text("utf-8")))
  classes = {
    node.name
    for tree in package.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
  }
  lines = []
  for path, tree in package.items():
    for node in definitions(tree.body, classes):
      inside = Counter(references(node))[node.name]
      if used[node.name] > inside:
        continue
      if node.name.startswith("_") or not outside[node.name]:
        where = f"{path.relative_to(root)}:{node.lineno}"
        lines.append(f"{where}: nothing calls {node.name}")
  return lines


def main() -> int:
  """Prints unused functions; returns the exit status."""
  lines = find_unused(ROOT)
  print(*lines, sep="\n", end="\n" if lines else "")
  return int(bool(lines))


if __name__ == "__main__":
  sys.exit(main())
