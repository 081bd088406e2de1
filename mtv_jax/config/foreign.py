"""Readers of untrusted files: text, JSON with typed fields, file names.

Errors name the file, the key, the value and the expected type.
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
  """Reads an untrusted JSON file.

  Raises InputError unless it is a regular JSON file of at most `max_bytes`.
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
  """Reads a JSON object; {} if the file does not exist.

  Raises as `read_untrusted_json`, and if the content is not an object.
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
  """Reads a key's value, converted to an annotation of `config.options`.

  Args:
    content: a JSON object; null counts as absent.
    key: the key to read.
    annotation: the value's type.
    where: prefix of the key in errors, such as "text_config.".
    default: value of an absent key; without it, absence raises InputError.
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
  """Reads an object's non-null values; checks keys in `annotations`.

  Raises InputError for a wrong type or range, or if `content` is not an object.
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
  """Reads the list of objects `content[key]` of a JSON file.

  Args:
    path: the file.
    content: its content, or an object in it.
    key: the list's key.
    fields: required keys of an object and their types; int rejects bools.
    hint: end of the error for a missing key.
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
  """Resolves a file name that another file lists, within a folder.

  Args:
    folder: the data's folder.
    name: a relative path without '..'. Links may point outside the folder, as
      in the cache of the Hub.
    where: the file that lists the name.
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
  """Whether a file system can store the path."""
  try:
    sizes = [len(part.encode()) for part in path.parts]
  except UnicodeEncodeError:  # A lone surrogate.
    return False
  fits = max(sizes) <= _MAX_NAME_BYTES and sum(sizes) <= _MAX_PATH_BYTES
  return fits and "\0" not in str(path)
