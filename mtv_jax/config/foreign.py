"""Untrusted files: text, JSON with typed fields, names in a folder.

Errors name the file, the key, the value and what was expected.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from mtv_jax.config import options
from mtv_jax.config.options import shorten_repr
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  ConfigError,
  InputError,
  did_you_mean,
  printable,
)

# Of configs, and of annotations (COCO's are 450 MB).
MAX_CONFIG_BYTES = 64 << 20
_MAX_BYTES = 8 << 30
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 2048
_MAX_MESSAGE = 2000  # Characters of an error; a file may have long values.
_REQUIRED = object()


def read_text(path: pathlib.Path) -> str:
  """A text file without its byte order mark; InputError if not UTF-8."""
  try:
    return path.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise InputError(f"{path} is not UTF-8 text: {error}") from None


def read_untrusted_json(
  path: pathlib.Path, *, max_bytes: int = _MAX_BYTES
) -> Any:
  """The content of an untrusted JSON file.

  Raises InputError unless it is a regular file of JSON of at most `max_bytes`.
  """
  path_lib.check_regular_file(path)
  if (size := path.stat().st_size) > max_bytes:
    raise InputError(
      f"{path} has {size:,} bytes; expected at most {max_bytes:,} of JSON."
    )
  try:
    return json.loads(path.read_bytes())
  except ValueError as error:
    raise InputError(f"{path} is not JSON: {error}") from None
  except RecursionError:
    raise InputError(f"{path} is JSON that is nested too deep.") from None


def read_object(path: pathlib.PurePath) -> dict[str, Any]:
  """The object in a JSON file; {} if the file does not exist.

  Errors as in `read_untrusted_json`, or if the content is not an object.
  """
  if not path_lib.is_file(path):
    return {}
  path = path_lib.local_copy(path)
  value = read_untrusted_json(path, max_bytes=MAX_CONFIG_BYTES)
  if not isinstance(value, dict):
    raise InputError(
      f"{path} is not a JSON object but a {type(value).__name__}."
    )
  return value


def read_field(
  content: Mapping[str, Any],
  key: str,
  annotation: Any,
  *,
  where: str = "",
  default: Any = _REQUIRED,
) -> Any:
  """The value of a key, converted to an annotation of `config.options`.

  Args:
    content: an object of JSON, in which null is as an absent key.
    key: what to read.
    annotation: of the value.
    where: put before the key in errors, such as "text_config.".
    default: of an absent key, which is an error without one.
  """
  value = content.get(key)
  if value is not None:
    try:
      return options.check_value(value, annotation, f"{where}{key}")
    except ConfigError as error:
      raise InputError(str(error)) from None
  if default is not _REQUIRED:
    return default
  raise InputError(
    f"{where}{key} is missing, expected {options.describe(annotation)}."
    f" {printable(did_you_mean(key, content, limit=8))}"
  )


def read_fields(
  content: Any, annotations: Mapping[str, Any], *, where: str = ""
) -> dict[str, Any]:
  """An object's keys with a value, checked where `annotations` has the key.

  Raises InputError for another type or range, or what is not an object.
  """
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
  """The objects in the list `content[key]` of a JSON file.

  Args:
    path: the file.
    content: its content, or an object in it.
    key: of the list.
    fields: type of each key that an object must have; int rejects bools.
    hint: ends the error about a missing key.
  """
  rows = content.get(key)
  if not isinstance(rows, list):
    raise InputError(
      f"{path}: {key!r} is {_type_name(rows)}; expected a list of objects."
    )
  kinds = {
    name: kind if isinstance(kind, tuple) else (kind,)
    for name, kind in fields.items()
  }
  for i, row in enumerate(rows):
    if not isinstance(row, dict):
      raise InputError(
        f"{path}: {key}[{i}] is {_type_name(row)}; expected an object."
      )
    for name, kind in kinds.items():
      if name not in row:
        raise InputError(
          f"{path}: {key}[{i}] has no {name!r}, only"
          f" {shorten_repr(sorted(row)[:8])};"
          f" {hint or f'expected {sorted(fields)}'}."
        )
      if type(row[name]) not in kind:
        raise InputError(
          f"{path}: {name!r} of {key}[{i}] is"
          f" {shorten_repr(row[name])}, {_type_name(row[name])};"
          f" expected {' or '.join(k.__name__ for k in kind)}."
        )
  return rows


def _type_name(value: Any) -> str:
  return "missing" if value is None else f"of type {type(value).__name__}"


@contextlib.contextmanager
def errors_of(path: str | os.PathLike) -> Iterator[None]:
  """Puts a file's path before the errors about its content, and cuts them."""
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
  """The path of a file in a folder, by the name that another file gives it.

  Args:
    folder: of the data.
    name: a relative path. Links may lead out of the folder, as in the cache of
      the Hub; the name may not.
    where: the file that gives the name.
  """
  path = pathlib.PurePath(name) if isinstance(name, str) else None
  if path is None or not path.parts or not _is_storable(path):
    reason = "expected the name of a file"
  elif path.is_absolute() or ".." in path.parts:
    reason = f"expected a relative path in {folder}, without '..'"
  else:
    return pathlib.Path(folder, path)
  raise InputError(f"{where} names the file {shorten_repr(name)}; {reason}.")


def _is_storable(path: pathlib.PurePath) -> bool:
  """Whether a file system can have such a name."""
  try:
    sizes = [len(part.encode()) for part in path.parts]
  except UnicodeEncodeError:  # A lone surrogate.
    return False
  fits = max(sizes) <= _MAX_NAME_BYTES and sum(sizes) <= _MAX_PATH_BYTES
  return fits and "\0" not in str(path)
