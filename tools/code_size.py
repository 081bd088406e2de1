"""Size of the package: lines, files, import closures, share of validation.

  python3 tools/code_size.py               # all measures, as a table
  python3 tools/code_size.py --validation  # validation by package

An import closure is the sum of lines of the modules that a module imports at
module level, transitively: packages' `__init__` included, `TYPE_CHECKING` left
out. Validation is the code lines of `raise`, of an `if` that only raises, of
functions named check_*, require_* or reject_*, and of exception handlers; code
lines leave out blanks, comments and docstrings.
"""

import argparse
import ast
import collections
import io
import pathlib
import re
import tokenize

ROOT = pathlib.Path(__file__).parents[1]
ENTRIES = (
  "train.train",
  "train.forward",
  "objectives.dino",
  "models.two_tower",
)
_SKIPPED = {
  tokenize.COMMENT,
  tokenize.NL,
  tokenize.NEWLINE,
  tokenize.INDENT,
  tokenize.DEDENT,
  tokenize.ENCODING,
  tokenize.ENDMARKER,
}
_CHECK = re.compile(r"_?(check|require|reject|validate)(_|$)")


def find_modules() -> dict[str, pathlib.Path]:
  files = {}
  for path in sorted((ROOT / "mtv_jax").rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    files[name.removesuffix(".__init__")] = path
  return files


def count_lines(path: pathlib.Path) -> int:
  return len(path.read_text().splitlines())


def _list_imports(name: str, path: pathlib.Path):
  package = name if path.name == "__init__.py" else name.rpartition(".")[0]

  def visit(body):
    for node in body:
      if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
      elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
          parts = package.split(".")
          base = ".".join([*parts[: len(parts) - node.level + 1], base])
        base = base.strip(".")
        yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
      elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(
        node.test
      ):
        yield from visit(node.body + node.orelse)
      elif isinstance(node, ast.Try):
        yield from visit(node.body)

  yield from visit(ast.parse(path.read_text()).body)


def find_closure(entry: str, modules: dict[str, pathlib.Path]) -> set[str]:
  seen, todo = set(), [entry]
  while todo:
    name = todo.pop()
    if name in seen or name not in modules:
      continue
    seen.add(name)
    for imported in _list_imports(name, modules[name]):
      parts = imported.split(".")
      todo += [".".join(parts[: i + 1]) for i in range(len(parts))]
  return seen


def find_code_lines(text: str, tree: ast.AST) -> set[int]:
  lines = set()
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type not in _SKIPPED:
      lines.update(range(token.start[0], token.end[0] + 1))
  for node in ast.walk(tree):
    body = getattr(node, "body", None)
    if isinstance(body, list) and body:
      first = body[0]
      if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        lines -= set(range(first.lineno, first.end_lineno + 1))
  return lines


def find_validation(tree: ast.AST) -> set[int]:
  lines = set()
  for node in ast.walk(tree):
    is_check = isinstance(node, ast.FunctionDef) and _CHECK.match(node.name)
    is_guard = isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)
    if is_check or isinstance(node, (ast.Raise, ast.ExceptHandler)):
      lines.update(range(node.lineno, node.end_lineno + 1))
    elif is_guard:
      lines.update(range(node.lineno, node.body[-1].end_lineno + 1))
  return lines


def measure_validation(modules):
  code, validation = collections.Counter(), collections.Counter()
  for name, path in modules.items():
    text = path.read_text()
    tree = ast.parse(text)
    lines = find_code_lines(text, tree)
    package = ".".join(name.split(".")[1:2]) or "mtv_jax"
    code[package] += len(lines)
    validation[package] += len(lines & find_validation(tree))
  return code, validation


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--validation", action="store_true")
  args = parser.parse_args()
  modules = find_modules()
  code, validation = measure_validation(modules)
  if args.validation:
    for package, lines in code.most_common():
      count = validation[package]
      print(f"{package:12} {lines:6} {count:5} {100 * count / lines:5.1f} %")
  for entry in ENTRIES:
    names = find_closure(f"mtv_jax.{entry}", modules)
    lines = sum(count_lines(modules[name]) for name in names)
    print(f"closure of {entry:18} {lines:7,} lines, {len(names)} modules")
  total = sum(map(count_lines, modules.values()))
  print(f"package {total:,} lines, {len(modules)} files")
  tests = sum(map(count_lines, (ROOT / "tests").rglob("*.py")))
  print(f"tests {tests:,} lines")
  share = 100 * validation.total() / code.total()
  print(f"validation {share:.1f} % of {code.total():,} code lines")


if __name__ == "__main__":
  main()
