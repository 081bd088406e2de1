"""Errors that a user can act on, and suggestions for misspelled names.

A command line prints a `UserError` as one message. Everything else is a bug and
prints a traceback.
"""

import difflib
import importlib
import os
from collections.abc import Iterable
from typing import Any

from mtv_jax.utils.text import list_first


class UserError(Exception):
  """Base class: an unusable option, file or data set."""

  exit_code = 1  # Exit status of the command.


class ConfigError(UserError, ValueError):
  """An invalid config key, option or argument."""

  exit_code = 2  # As in argparse: retrying the command fails again.


class InputError(UserError, ValueError):
  """An invalid file, data set, checkpoint or model."""


class MissingFileError(UserError, FileNotFoundError):
  """A file or folder that does not exist."""


class StorageError(UserError, OSError):
  """A file or folder that can't be written, or a bucket that can't be read."""


class WorkerError(UserError):
  """A worker process was killed, or crashed."""


class FolderError(UserError, IsADirectoryError):
  """A folder where a file is expected."""


def printable(value: object, limit: int = 400) -> str:
  """Text for a message: shortened in the middle, lone surrogates escaped."""
  text = str(value)
  if len(text) > limit:
    head, tail = text[: limit - limit // 4], text[-(limit // 4) :]
    text = f"{head} [... {len(text) - limit} characters ...] {tail}"
  return text.encode(errors="backslashreplace").decode()


def did_you_mean(
  name: str, names: Iterable[str], *, limit: int = 40, cutoff: float = 0.6
) -> str:
  """Closing sentences of an error about an unknown name.

  "Did you mean 'b'? There are: a, b, c." The question is omitted if no name has
  a similarity of `cutoff`. At most `limit` names are listed, the closest ones.
  """
  names = sorted({str(n) for n in names})
  if not names:
    return "There are none."
  matches = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
  question = f"Did you mean {matches[0]!r}? " if matches else ""
  if len(names) > limit:
    names = difflib.get_close_matches(name, names, n=len(names), cutoff=0.0)
  return f"{question}There are: {list_first(names, limit)}."


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
  """Raises ConfigError unless `value` is one of `choices`."""
  if value not in (choices := tuple(choices)):
    raise ConfigError(
      f"{what} is {printable(repr(value))}. {did_you_mean(str(value), choices)}"
    )


def import_extra(module: str, extra: str) -> Any:
  """Imports a package of an extra; ImportError names the pip command."""
  if module == "onnxruntime":  # From 1.32 on, its import sends usage data.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(
      f"{module} is not installed: pip install 'mtv_jax[{extra}]'."
    ) from error
