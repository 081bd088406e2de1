"""Partial restore: copies matching arrays of one tree into another."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import closest_names, flatten_with_names, select_names


class CheckpointMismatchError(InputError):
  """Raised if a checkpoint's names, shapes or types are not as expected."""


def first_lines(lines: Sequence[str], limit: int) -> str:
  """The first `limit` lines, and the number of further lines."""
  shown = [f"  {line}" for line in lines[:limit]]
  if len(lines) > limit:
    shown.append(f"  ... and {len(lines) - limit} more")
  return "\n".join(shown)


@dataclasses.dataclass(frozen=True)
class MergeReport:
  """Result of `merge_params` by parameter name."""

  loaded: tuple[str, ...]
  missing: tuple[str, ...]  # Wanted (included), but not in the source.
  unexpected: tuple[str, ...]  # In the source, but not in the target.
  # Shapes in the source and in the target, if they differ.
  mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
  coverage: float  # Loaded / wanted, counted in elements.
  untouched: tuple[str, ...] = ()  # Optional groups that the source lacks.

  def __str__(self) -> str:
    shapes = [f"{n}  {a} -> {b}" for n, (a, b) in self.mismatched.items()]
    lines = [
      f"loaded {len(self.loaded)} arrays,"
      f" {100 * self.coverage:.1f} % of the wanted parameters"
    ]
    for title, names in [
      ("missing from the source", self.missing),
      ("unexpected in the source", self.unexpected),
      ("of another shape", shapes),
      ("unchanged, as the source lacks them", self.untouched),
    ]:
      if names:
        lines.append(f"{title} ({len(names)}):\n{first_lines(names, 10)}")
    return "\n".join(lines)


def merge_params(
  target_params: Any,
  source_tree: Any,
  *,
  include: Sequence[str] = (".",),
  rename: Sequence[Sequence[str]] = (),
  min_coverage: float = 0.99,
  optional: str | None = None,
) -> tuple[Any, MergeReport]:
  """Copies matching arrays of a source tree into a copy of `target_params`.

  Args:
    target_params: a tree of arrays.
    source_tree: a tree of arrays, such as `load_tree` returns.
    include: regexes; a target parameter is wanted if any matches its name.
    rename: pairs (regex, replacement) for `re.sub`, all applied in order to
      each source name.
    min_coverage: minimum fraction of the wanted elements that must be loaded.
    optional: a regex matched at the start of names. Each distinct match is a
      group, such as a head. A group stays unchanged and is not wanted, unless
      the source has all of it with equal shapes.

  Returns:
    The parameters and the report. Loaded parameters are numpy arrays of the
    target's dtype.

  Raises:
    CheckpointMismatchError: coverage is too low; the message has the report.
    InputError: an include matches nothing, or two source names collide.
  """
  target = dict(flatten_with_names(target_params))
  source = _rename(dict(flatten_with_names(source_tree)), rename)
  wanted = select_names(target, include, what="init.include", unused="error")
  untouched = _lacking_groups(optional, wanted, target, source)
  if untouched:
    wanted = [name for name in wanted if not name.startswith(untouched)]
  out = dict(target)
  loaded, missing, mismatched = [], [], {}
  for name in wanted:
    if name not in source:
      missing.append(name)
    elif tuple(source[name].shape) != tuple(target[name].shape):
      mismatched[name] = tuple(source[name].shape), tuple(target[name].shape)
    else:
      out[name] = np.asarray(source[name]).astype(target[name].dtype)
      loaded.append(name)
  size, total = (
    sum(target[name].size for name in names) for names in (loaded, wanted)
  )
  report = MergeReport(
    tuple(loaded),
    tuple(missing),
    tuple(name for name in source if name not in target),
    mismatched,
    size / total if total else 1.0,
    untouched,
  )
  if report.coverage < min_coverage:
    hint = ""
    if missing and report.unexpected:
      hint = (
        f"\nFor {missing[0]!r}: {closest_names(missing[0], report.unexpected)}"
        "\nMap names with init.rename, or choose them with init.include."
      )
    raise CheckpointMismatchError(
      f"{100 * report.coverage:.1f} % of the wanted parameters, at least"
      f" {100 * min_coverage:g} % expected (init.min_coverage).\n{report}{hint}"
    )
  structure = jax.tree.structure(target_params)
  return jax.tree.unflatten(structure, list(out.values())), report


def _lacking_groups(
  optional: str | None,
  names: Sequence[str],
  target: Mapping[str, Any],
  source: Mapping[str, Any],
) -> tuple[str, ...]:
  """The optional groups that the source lacks in part."""
  lacking = {}  # In order.
  for name in names:
    same = name in source and source[name].shape == target[name].shape
    if optional and not same and (match := re.match(optional, name)):
      lacking[match[0]] = None
  return tuple(lacking)


def _rename(
  source: Mapping[str, Any], rename: Sequence[Sequence[str]]
) -> dict[str, Any]:
  out, origin = {}, {}
  for old, leaf in source.items():
    new = old
    for pattern, replacement in rename:
      new = re.sub(pattern, replacement, new)
    if new in out:
      raise InputError(
        f"init.rename: {origin[new]!r} and {old!r} both become {new!r}."
      )
    out[new], origin[new] = leaf, old
  return out
