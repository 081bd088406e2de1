"""Parsing of encoder arguments on the command line: paths, weights, names."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from mtv_jax.encoder import baselines, loading
from mtv_jax.evals import published
from mtv_jax.utils import hub
from mtv_jax.utils.errors import ConfigError, did_you_mean

_WEIGHTS = re.compile(rf"(.+)@({'|'.join(loading.WEIGHTS)})")
# A name can't contain `/`, `:` or `@`, so that it isn't part of a path.
_NAMED = re.compile(r"([^=/:@]+)=(.+)")


class Request(NamedTuple):
  """An encoder requested on the command line."""

  path: str
  weights: str  # `student`, `teacher` or `ema`.
  name: str  # in tables
  # Hugging Face id of the released checkpoint, if it has published figures
  # (`published.FIGURES`); else "".
  checkpoint: str = ""


def parse_requests(
  encoders: Sequence[str], *, weights: str | None
) -> list[Request]:
  """Parses `[NAME=]PATH[@WEIGHTS][@CHECKPOINT]`, in order.

  The default name is the shortest unique suffix of the path. A folder's shape
  or name doesn't identify a released checkpoint: @CHECKPOINT does, or a hub
  path that is its id. A path with @REVISION may have different weights.
  """
  parsed = [_parse_request(argument, weights) for argument in encoders]
  keys = [request[:2] for request in parsed]
  if len(set(keys)) < len(keys):
    path, choice = next(k for k in keys if keys.count(k) > 1)
    raise ConfigError(f"the encoder {path} is given twice ({choice} weights).")
  paths = [request.path for request in parsed]
  requests = []
  for request, name in zip(parsed, distinct_names(paths), strict=True):
    name += f"@{request.weights}" if paths.count(request.path) > 1 else ""
    requests.append(request._replace(name=request.name or name))
  check_names([request.name for request in requests])
  return requests


def check_names(names: Sequence[str]) -> None:
  """Raises ConfigError for duplicate names."""
  if len(set(names)) < len(names):
    name = next(n for n in names if names.count(n) > 1)
    raise ConfigError(
      f"two encoders have the name {name!r}. Give each its own: NAME=PATH."
    )


def split_name(given: str) -> tuple[str, str]:
  """Splits NAME=PATH; the name of a bare path is ""."""
  match = _NAMED.fullmatch(given)
  return match.groups() if match and not os.path.exists(given) else ("", given)


def _parse_request(argument: str, weights: str | None) -> Request:
  """Parses one request; its name is "" if none is given."""
  name, path = split_name(argument)
  choice, checkpoint = None, ""
  for released in published.FIGURES:
    if path.endswith(f"@{released}"):
      path, checkpoint = path.removesuffix(f"@{released}"), released
  if match := _WEIGHTS.fullmatch(path):
    path, choice = match.groups()
  if hub.is_name(path):
    repository = path.removeprefix(hub.PREFIX)
    checkpoint = checkpoint or repository * (repository in published.FIGURES)
  elif not baselines.is_baseline(path):
    _check_suffix(path)
  if choice is None:
    # A baseline has one set of weights.
    default = "student" if baselines.is_baseline(path) else weights
    choice = default or loading.default_weights(path)
  return Request(path, choice, name, checkpoint)


def _check_suffix(path: str) -> None:
  """Raises ConfigError for an unknown @SUFFIX of a folder that exists."""
  folder, at, suffix = path.partition("@")
  if at and not os.path.exists(path) and os.path.exists(folder):
    suffixes = [*loading.WEIGHTS, *published.FIGURES]
    raise ConfigError(
      f"{path}: {suffix!r} is neither weights nor a checkpoint with published "
      f"figures. {did_you_mean(suffix, suffixes)}"
    )


def distinct_names(paths: Sequence[str]) -> list[str]:
  """Shortest unique suffix of each path; equal paths get equal names."""
  names = []
  for path in paths:
    others = {n for p in paths if p != path for n in _short_names(p)}
    names.append(next((n for n in _short_names(path) if n not in others), path))
  return names


def _short_names(path: str) -> list[str]:
  """Suffixes of a path, shortest first; a baseline has one name."""
  if baselines.is_baseline(path):
    return [path]
  parts = pathlib.PurePath(path).parts
  return ["/".join(parts[-k:]) for k in range(1, len(parts) + 1)] or [path]
