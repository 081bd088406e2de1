"""Readers of untrusted files: text, JSON, pickles, file names.

Errors name the file, the key, the value and the expected type.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from mtv_jax.config import options
from mtv_jax.config.options import shorten_repr
from mtv_jax.utils import errors
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError, InputError, printable

# Limits for configs and for annotations (COCO's are 450 MB).
MAX_CONFIG_BYTES = 64 << 20
_MAX_BYTES = 8 << 30
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 2048
_MAX_MESSAGE = 2000  # Characters of an error, for files with long values.
_REQUIRED = object()


def read_text(path: pathlib.Path) -> str:
  """Reads text without its byte order mark; InputError if not UTF-8."""
  try:
    return path.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise InputError(f"{path} is not UTF-8 text: {error}") from None


def read_untrusted_json(
  path: pathlib.Path, *, max_bytes: int = _MAX_BYTES
) -> Any:
  """Reads a regular JSON file of at most `max_bytes`; InputError otherwise."""
  data = path_lib.read_regular(path, limit=max_bytes)
  try:
    return json.loads(data)
  except ValueError as error:
    raise InputError(f"{path} is not JSON: {error}") from None
  except RecursionError:
    raise InputError(f"{path} is JSON that is nested too deeply.") from None


def read_json_or_lines(path: pathlib.Path) -> Any:
  """Reads JSON, or JSON lines as a list; InputError otherwise."""
  text = read_text(path)
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    try:
      # Not `splitlines`: JSON may hold other line separators, such as U+2028.
      return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
      raise InputError(
        f"{path} is neither JSON ({error}) nor one object per line"
      ) from None


def read_object(path: pathlib.PurePath) -> dict[str, Any]:
  """Reads a JSON object; {} if the file does not exist."""
  if not path_lib.is_file(path):
    return {}
  path = path_lib.local_copy(path)
  value = read_untrusted_json(path, max_bytes=MAX_CONFIG_BYTES)
  if not isinstance(value, dict):
    kind = type(value).__name__
    raise InputError(f"{path} is not a JSON object but a {kind}.")
  return value


class _ValueUnpickler(pickle.Unpickler):
  """Reads plain values and NumPy arrays; refuses code."""

  _ALLOWED = ("ndarray", "dtype", "scalar", "_reconstruct", "_frombuffer")

  def find_class(self, module: str, name: str) -> Any:
    is_array = module.partition(".")[0] == "numpy" and name in self._ALLOWED
    if is_array or (module, name) == ("_codecs", "encode"):
      return super().find_class(module, name)
    raise pickle.UnpicklingError(f"it holds {module}.{name}, not only values")


def read_pickle(path: pathlib.Path, *, expected: str) -> Any:
  """Unpickles values and arrays (Python 2 or 3); InputError for others."""
  try:
    with path.open("rb") as file:
      return _ValueUnpickler(file, encoding="utf-8").load()
  except Exception as error:  # A damaged pickle can raise any exception.
    reason = f"{type(error).__name__}: {error}"
    raise InputError(f"{path}: {reason}; expected {expected}") from None


def read_field(
  content: Mapping[str, Any],
  key: str,
  annotation: Any,
  *,
  where: str = "",
  default: Any = _REQUIRED,
) -> Any:
  """Reads a key's value, converted to `annotation` by `config.options`.

  `where` is a prefix of the key in errors, such as "text_config.". Returns the
  default if the key is absent or null; raises InputError if there is no
  default.
  """
  value = content.get(key)
  if value is not None:
    try:
      return options.check_value(value, annotation, f"{where}{key}")
    except ConfigError as error:
      raise InputError(str(error)) from None
  if default is not _REQUIRED:
    return default
  hint = printable(errors.did_you_mean(key, content, limit=8))
  kind = options.describe(annotation)
  raise InputError(f"{where}{key} is missing, expected {kind}. {hint}")


def read_fields(
  content: Any, annotations: Mapping[str, Any], *, where: str = ""
) -> dict[str, Any]:
  """Reads an object's non-null values; checks the keys in `annotations`."""
  if not isinstance(content, Mapping):
    name = where.rstrip(".") or "The content"
    raise InputError(f"{name} is {shorten_repr(content)}, expected an object.")
  return {
    key: read_field(content, key, annotations.get(key, Any), where=where)
    for key, value in content.items()
    if value is not None
  }


def read_rows(
  path: str | os.PathLike,
  content: Mapping[str, Any],
  key: str,
  fields: Mapping[str, type | tuple[type, ...]],
  *,
  hint: str = "",
) -> list[Mapping[str, Any]]:
  """Reads the list of objects `content[key]` of a JSON file.

  `fields` maps the required keys of an object to their types (int rejects
  bools); `hint` ends the error for a missing key.
  """
  rows = content.get(key)
  if not isinstance(rows, list):
    kind = _describe_type(rows)
    raise InputError(f"{path}: {key!r} is {kind}; expected a list of objects.")
  hint = hint or f"expected {sorted(fields)}"
  for i, row in enumerate(rows):
    at = f"{key}[{i}]"
    if not isinstance(row, dict):
      raise InputError(
        f"{path}: {at} is {_describe_type(row)}; expected an object."
      )
    for name, kinds in fields.items():
      kinds = kinds if isinstance(kinds, tuple) else (kinds,)
      if name not in row:
        names = shorten_repr(sorted(row)[:8])
        raise InputError(f"{path}: {at} has no {name!r}, only {names}; {hint}.")
      if type(row[name]) not in kinds:
        value, kind = shorten_repr(row[name]), _describe_type(row[name])
        expected_kinds = " or ".join(k.__name__ for k in kinds)
        what = f"{name!r} of {at} is {value}, {kind}; expected {expected_kinds}"
        raise InputError(f"{path}: {what}.")
  return rows


def _describe_type(value: Any) -> str:
  return "missing" if value is None else f"of type {type(value).__name__}"


@contextlib.contextmanager
def errors_of(path: str | os.PathLike) -> Iterator[None]:
  """Prefixes errors about a file's content with its path; truncates them."""
  try:
    yield
  except (ConfigError, InputError) as error:
    text = printable(error, _MAX_MESSAGE)
    is_named = str(path) in text
    if is_named and text == str(error):
      raise
    kind = InputError if isinstance(error, ConfigError) else type(error)
    raise kind(text if is_named else f"{path}: {text}") from error


def resolve_name(
  folder: str | os.PathLike, name: Any, *, where: str | os.PathLike
) -> pathlib.Path:
  """Resolves a relative file name, listed by the file `where`, in a folder.

  Links may point outside the folder, as in the cache of the Hub.
  """
  path = pathlib.PurePath(name if isinstance(name, str) else "")
  if not path.parts or not _is_storable(path):
    reason = "expected the name of a file"
  elif path.is_absolute() or ".." in path.parts:
    reason = f"expected a relative path in {folder}, without '..'"
  else:
    return pathlib.Path(folder, path)
  raise InputError(f"{where} names the file {shorten_repr(name)}; {reason}.")


def _is_storable(path: pathlib.PurePath) -> bool:
  try:
    sizes = [len(part.encode()) for part in path.parts]
  except UnicodeEncodeError:  # A lone surrogate.
    return False
  fits = max(sizes) <= _MAX_NAME_BYTES and sum(sizes) <= _MAX_PATH_BYTES
  return fits and "\0" not in str(path)
