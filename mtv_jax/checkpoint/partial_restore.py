"""Partial restore: copies matching arrays of one tree into another."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtv_jax.checkpoint import checksums
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.text import first_lines
from mtv_jax.utils.tree import closest_names, flatten_with_names, select_names


class CheckpointMismatchError(InputError):
  """Raised if a checkpoint's names, shapes or types are not as expected."""


def require_same(
  saved: Mapping[str, Any], wanted: Mapping[str, Any], path: str
) -> None:
  """Raises CheckpointMismatchError with a diff of names, shapes and types."""
  lines = []
  for name in sorted({*saved, *wanted}):
    old, new = (
      checksums.describe(tree[name]) if name in tree else ""
      for tree in (saved, wanted)
    )
    if old != new:
      lines += [f"- {name}  {old}"] if old else []
      lines += [f"+ {name}  {new}"] if new else []
  if lines:
    raise CheckpointMismatchError(
      f"{path} does not match the state of this config"
      " (- in the checkpoint, + in this run):\n"
      f"{first_lines(lines, 20)}\n"
      "Resume with the config that started the run (its config.json), or load"
      " what fits into a new run through config.init."
    )


@dataclasses.dataclass(frozen=True)
class MergeReport:
  """Result of `merge_params` by parameter name."""

  loaded: tuple[str, ...]
  missing: tuple[str, ...]  # Wanted (see `include`), but not in the source.
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
      ("with different shapes", shapes),
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

  Loaded parameters are numpy arrays of the target's dtype.

  Args:
    target_params: a tree of arrays.
    source_tree: a tree of arrays, such as `load_tree` returns.
    include: regexes; a target parameter is wanted if any matches its name.
    rename: pairs (regex, replacement) for `re.sub`, all applied in order to
      each source name.
    min_coverage: minimum fraction of the wanted elements that must be loaded.
    optional: a regex matched at the start of names. Each distinct match is a
      group, such as a head. Unless the source has all of a group with equal
      shapes, the group stays unchanged and does not count as wanted.

  Raises:
    CheckpointMismatchError: coverage is too low; the message has the report.
    InputError: a regex of `include` matches nothing, or source names collide.
  """
  target = dict(flatten_with_names(target_params))
  source = _rename_keys(dict(flatten_with_names(source_tree)), rename)
  target_names = select_names(
    target, include, what="init.include", unused="error"
  )
  fits = {
    name
    for name in source.keys() & {*target_names}
    if source[name].shape == target[name].shape
  }
  incomplete = {}  # Optional groups that the source lacks in part, in order.
  for name in target_names:
    if optional and name not in fits and (match := re.match(optional, name)):
      incomplete[match[0]] = None
  untouched = tuple(incomplete)
  if untouched:
    target_names = [
      name for name in target_names if not name.startswith(untouched)
    ]
  loaded = [name for name in target_names if name in fits]
  arrays = {n: np.asarray(source[n]).astype(target[n].dtype) for n in loaded}
  shapes = {
    name: (tuple(source[name].shape), tuple(target[name].shape))
    for name in target_names
    if name in source and name not in fits
  }
  missing = tuple(name for name in target_names if name not in source)
  num_loaded, num_wanted = (
    sum(target[name].size for name in names) for names in (loaded, target_names)
  )
  report = MergeReport(
    tuple(loaded),
    missing,
    tuple(name for name in source if name not in target),
    shapes,
    num_loaded / num_wanted if num_wanted else 1.0,
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
      f"{100 * report.coverage:.1f} % of the wanted parameters loaded, at least"
      f" {100 * min_coverage:g} % expected (init.min_coverage).\n{report}{hint}"
    )
  structure = jax.tree.structure(target_params)
  return jax.tree.unflatten(structure, (target | arrays).values()), report


def _rename_keys(
  source: Mapping[str, Any], rename: Sequence[Sequence[str]]
) -> dict[str, Any]:
  renamed, origins = {}, {}
  for old, leaf in source.items():
    new = old
    for pattern, replacement in rename:
      new = re.sub(pattern, replacement, new)
    if new in renamed:
      raise InputError(
        f"init.rename: {origins[new]!r} and {old!r} both become {new!r}."
      )
    renamed[new], origins[new] = leaf, old
  return renamed
