"""What a folder of labels is made with: said once, and the same ever after.

  settings.json         kind, settings, and the base's files with their records

The first run writes it before the first label, so that a run with other
settings, which would mix its labels with those that are there, is told what
differs.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtv_jax.data.labels import label_sets
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError

FILE = "settings.json"
_SHOWN = 12
_WIDTH = 60


def describe(kind: str, settings: Mapping[str, Any], base: Any) -> dict:
  """What `settings.json` holds.

  Args:
    kind: of the labels.
    settings: everything that decides what they are.
    base: the source.

  Raises:
    TypeError: settings that are no JSON.
  """
  starts = [0, *base.shards.tolist()]
  files = {
    file.name: end - start
    for file, start, end in zip(base.files, starts, starts[1:], strict=False)
  }
  described = {
    "version": label_sets.VERSION,
    "kind": kind,
    "settings": dict(settings),
    "base": files,
  }
  # As it is read again: JSON knows no tuples.
  return json.loads(json.dumps(described))


def settle(out: Path, described: Mapping[str, Any]) -> None:
  """Says what a folder is for, or finds that it is for the same.

  Raises:
    FileExistsError: it is for something else; says what differs.
  """
  manifest = out / label_sets.MANIFEST
  if manifest.exists():
    check_manifest(out, described)
  text = json.dumps(described, ensure_ascii=False, indent=1) + "\n"
  found = _parse(atomic.write_if_absent(out / FILE, text.encode()), out / FILE)
  if changed := list(differences(found, described)):
    raise FileExistsError(
      f"{out} holds an unfinished label set that is made otherwise (there ->"
      f" here):{listed(changed)}\nGive another folder, or remove this one to"
      " make the labels anew."
    )


def check_manifest(out: Path, described: Mapping[str, Any]) -> None:
  """Compares a finished set with what is wanted.

  Args:
    out: its folder.
    described: what is wanted; without "base", that is not compared.

  Raises:
    FileExistsError: they differ; says in what.
  """
  manifest = _parse(
    (out / label_sets.MANIFEST).read_bytes(), out / label_sets.MANIFEST
  )
  found = {
    "version": manifest.get("version"),
    "kind": manifest.get("kind"),
    "settings": manifest.get("settings"),
    "base": {s["base"]: s["records"] for s in manifest.get("shards", [])},
  }
  found = {key: found[key] for key in described}
  if changed := list(differences(found, described)):
    raise FileExistsError(
      f"{out} holds a finished label set that was made otherwise (there ->"
      f" here):{listed(changed)}\nGive another folder, or remove this one to"
      " make the labels anew."
    )


def _parse(data: bytes, file: Path) -> dict:
  try:
    found = json.loads(data)
    if not isinstance(found, dict):
      raise InputError(f"a {type(found).__name__}")
  except ValueError as error:
    raise FileExistsError(
      f"{file} can't be read ({error}), so nobody knows what the labels beside"
      " it were made with. Remove the folder, or give another one."
    ) from error
  return found


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
  """Lines such as "settings.threshold: 0.1 -> 0.2", key by key."""
  if not (isinstance(there, Mapping) and isinstance(here, Mapping)):
    if there != here:
      yield f"{path}: {_short(there)} -> {_short(here)}"
    return
  for key in [*there, *(k for k in here if k not in there)]:
    inner = f"{path}.{key}" if path else str(key)
    if key not in here:
      yield f"{inner}: {_short(there[key])} -> none"
    elif key not in there:
      yield f"{inner}: none -> {_short(here[key])}"
    else:
      yield from differences(there[key], here[key], inner)


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def listed(lines: list[str]) -> str:
  """Differences for an error, a line each; of many the first ones."""
  more = len(lines) - _SHOWN
  shown = lines[:_SHOWN] + [f"... and {more} more"] * (more > 0)
  return "".join(f"\n  {line}" for line in shown)
