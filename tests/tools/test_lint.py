"""Checks of `make lint`: unused functions, growing packages; class names."""

import ast
import collections
import json
import runpy

import pytest


@pytest.fixture
def package(tmp_path):
  """A project with one module, of a line that the test adds to."""
  for name in ("mtv_jax", "docs"):
    (tmp_path / name).mkdir()
  (tmp_path / "README.md").write_text("`documented`")
  return tmp_path / "mtv_jax" / "module.py"


@pytest.mark.parametrize(
  ("source", "unused"),
  [
    ("def _f():\n  return _f()", ["_f"]),
    ("def f():\n  '''g'''\ndef g():\n  f()", ["g"]),
    ("def _f(): pass\nx = getattr(object(), 'a._f')", []),
    ("class A:\n  def f(self): pass\n  def __len__(self): return 0", ["f"]),
    ("class A(B):\n  def f(self): pass\n  def _g(self): pass", ["_g"]),
    ("def documented(): pass\ndef _documented(): pass", ["_documented"]),
  ],
)
def test_what_nothing_calls_is_named(package, repo_root, source, unused):
  package.write_text(source)
  find = runpy.run_path(repo_root / "tools" / "unused.py")["find_unused"]
  lines = find(package.parents[1])
  assert [line.rpartition(" ")[2] for line in lines] == unused


def test_a_package_that_grows_is_named(tmp_path, repo_root, capsys):
  module = runpy.run_path(repo_root / "tools" / "ast_nodes.py")
  text = '"""A module."""\nx = 1\n'
  assert module["count_nodes"](text) == module["count_nodes"]("x = 1")
  main, table = module["main"], tmp_path / "table.json"
  main.__globals__["TABLE"] = table
  assert main(["--update"]) == main([]) == 0
  table.write_text(json.dumps(json.loads(table.read_text()) | {"perf": 9}))
  assert main([]) == 1
  assert "perf has" in capsys.readouterr().out


def test_public_class_names_are_unique(repo_root):
  modules = collections.defaultdict(list)
  for path in sorted((repo_root / "mtv_jax").rglob("*.py")):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
      if isinstance(node, ast.ClassDef) and node.name[0] != "_":
        modules[node.name].append(str(path.relative_to(repo_root)))
  # Contracts: the flags of a command, what an objective's loss reads.
  for contract in ("Flags", "LossInputs"):
    del modules[contract]
  assert not {name: m for name, m in modules.items() if len(m) > 1}
