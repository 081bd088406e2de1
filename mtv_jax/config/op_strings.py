"""Op strings: "decode|canvas(384)|caption(64, pick='first')"."""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mtv_jax.config import options
from mtv_jax.utils.errors import ConfigError, did_you_mean, printable


@dataclasses.dataclass(frozen=True)
class Op:
  """A named op with literal arguments."""

  name: str
  args: tuple = ()
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    args = [repr(a) for a in self.args]
    args += [f"{k}={v!r}" for k, v in self.kwargs.items()]
    return f"{self.name}({', '.join(args)})" if args else self.name


def parse_ops(text: str, *, unique: bool = False) -> list[Op]:
  """Parses ops joined by `|`; `unique` rejects a repeated op."""
  # Line breaks are layout; a space preserves every position.
  line = text.replace("\n", " ")
  if not line.strip():
    return []
  indent = len(line) - len(line.lstrip())
  try:
    tree = ast.parse(line[indent:], mode="eval")
  except SyntaxError as e:
    raise _syntax_error(line, indent + (e.offset or 1) - 1, e.msg) from None

  def make_error(node: ast.AST, reason: str) -> ConfigError:
    # ast counts UTF-8 bytes; report characters.
    head = line[indent:].encode()[: node.col_offset].decode(errors="ignore")
    return _syntax_error(line, indent + len(head), reason)

  ops = [_parse_op(node, make_error) for node in _flatten(tree.body)]
  names = [op.name for op in ops]
  if unique and (repeated := {n for n in names if names.count(n) > 1}):
    raise ConfigError(f"the ops {text!r} repeat {min(repeated)!r}.")
  return ops


def _flatten(node: ast.expr) -> list[ast.expr]:
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    return _flatten(node.left) + _flatten(node.right)
  return [node]


def _parse_op(node: ast.expr, make_error: Callable[..., Exception]) -> Op:
  if isinstance(node, ast.Name):
    return Op(node.id)
  if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
    reason = "an op is a name, or a name with arguments in parentheses"
    raise make_error(node, reason)
  if any(k.arg is None for k in node.keywords):
    raise make_error(node, "** is not allowed")

  def read_literal(value: ast.expr) -> Any:
    try:
      return ast.literal_eval(value)
    except ValueError:
      reason = "arguments are literals: numbers, quoted strings, tuples"
      raise make_error(value, reason) from None

  args = tuple(map(read_literal, node.args))
  return Op(
    node.func.id, args, {k.arg: read_literal(k.value) for k in node.keywords}
  )


def _syntax_error(line: str, offset: int, reason: str) -> ConfigError:
  start = max(offset - 400, 0)
  return ConfigError(
    f"can't read the ops, at character {offset + 1}: {reason}\n"
    f"  {line[start : offset + 400]}\n  {' ' * (offset - start)}^\n"
    "They are written like \"decode|canvas(384)|caption(64, pick='first')\"."
  )


def build_op(op: Op, registry: Mapping[str, Callable], what: str) -> Any:
  """Calls an op's registered factory; errors call it a `what`."""
  if op.name not in registry:
    hint = did_you_mean(op.name, registry)
    raise ConfigError(f"unknown {what} {printable(op.name)!r}. {hint}")
  factory = registry[op.name]
  signature = inspect.signature(factory)
  try:
    arguments = signature.bind(*op.args, **op.kwargs).arguments
  except TypeError as e:
    usage = f"{op.name}({', '.join(map(str, signature.parameters.values()))})"
    raise ConfigError(f"{what} {op}: {e}. Its parameters are: {usage}.") from e
  return options.build(factory, arguments, where=f"{what} {op}")
