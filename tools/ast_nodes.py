#!/usr/bin/env python3
"""Limits the AST nodes of each package to tools/ast_nodes.json.

`make lint` fails if a package exceeds its row, so that growth is deliberate:
`python3 tools/ast_nodes.py --update` rewrites the table. Unlike lines, nodes do
not depend on formatting; docstrings don't count.
"""

import ast
import json
import pathlib
import sys
from collections import Counter
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = pathlib.Path(__file__).with_suffix(".json")
UPDATE = "python3 tools/ast_nodes.py --update"


def count_nodes(source: str) -> int:
  """Number of AST nodes of a module, without docstrings."""
  nodes = list(ast.walk(ast.parse(source)))
  documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
  docstrings = sum(
    ast.get_docstring(node) is not None
    for node in nodes
    if isinstance(node, documented)
  )
  return len(nodes) - 2 * docstrings  # Each is a statement and a constant.


def count_packages(root: pathlib.Path) -> dict[str, int]:
  """Nodes by folder of `mtv_jax/`; top-level modules count as 'mtv_jax'."""
  counts: Counter[str] = Counter()
  for path in sorted((root / "mtv_jax").rglob("*.py")):
    parts = path.relative_to(root / "mtv_jax").parts
    if parts[0] != "configs":
      package = parts[0] if len(parts) > 1 else "mtv_jax"
      counts[package] += count_nodes(path.read_text(encoding="utf-8"))
  return dict(sorted(counts.items()))


def main(argv: Sequence[str]) -> int:
  """Checks or updates the table; returns the exit status."""
  counts = count_packages(ROOT)
  if argv == ["--update"]:
    TABLE.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return 0
  table = json.loads(TABLE.read_text(encoding="utf-8"))
  grown = {
    name: count for name, count in counts.items() if count > table.get(name, 0)
  }
  for name, count in grown.items():
    print(
      f"{name} has {count:,} AST nodes, {count - table.get(name, 0):,} more "
      f"than in {TABLE.name}. Simplify it, or allow it: {UPDATE}"
    )
  return int(bool(grown))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
