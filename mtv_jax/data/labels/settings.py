"""Settings and manifest of a label set: written once, then compared.

`settings.json` (kind, settings, the base's files with their record counts) is
written before the first label, so that a run with other settings is refused
instead of mixing its labels with existing ones.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtv_jax.data.labels import label_sets
from mtv_jax.utils import atomic

FILE = "settings.json"
_SHOWN = 12
_WIDTH = 60


def describe(kind: str, settings: Mapping[str, Any], base: Any) -> dict:
  """The content of `settings.json`.

  Args:
    kind: of the labels.
    settings: all that determines the labels.
    base: the source.

  Raises:
    TypeError: settings that JSON cannot represent.
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
  # As it is read back: JSON turns tuples into lists.
  return json.loads(json.dumps(described))


def write_or_check_settings(out: Path, described: Mapping[str, Any]) -> None:
  """Writes `settings.json`, or compares with an existing one.

  Raises:
    FileExistsError: the folder has other settings; lists the differences.
  """
  if (out / label_sets.MANIFEST).exists():
    check_manifest(out, described)
  text = json.dumps(described, ensure_ascii=False, indent=1) + "\n"
  stored = _parse(atomic.write_if_absent(out / FILE, text.encode()), out / FILE)
  _require_equal(stored, described, f"{out} has an unfinished label set")


def check_manifest(out: Path, described: Mapping[str, Any]) -> None:
  """Compares a finished label set with the requested settings.

  Args:
    out: its folder.
    described: as `describe` returns it; keys it lacks are not compared.

  Raises:
    FileExistsError: they differ; lists the differences.
  """
  file = out / label_sets.MANIFEST
  manifest = _parse(file.read_bytes(), file)
  stored = {
    "version": manifest.get("version"),
    "kind": manifest.get("kind"),
    "settings": manifest.get("settings"),
    "base": {s["base"]: s["records"] for s in manifest.get("shards", [])},
  }
  stored = {key: stored[key] for key in described}
  _require_equal(stored, described, f"{out} has a finished label set")


def _require_equal(
  stored: Mapping[str, Any], requested: Mapping[str, Any], where: str
) -> None:
  if changed := list(differences(stored, requested)):
    raise FileExistsError(
      f"{where} with other settings (stored -> requested):{listed(changed)}\n"
      "Give another folder, or remove this one to label again."
    )


def _parse(data: bytes, file: Path) -> dict:
  try:
    content = json.loads(data)
    if not isinstance(content, dict):
      raise ValueError(f"a {type(content).__name__}")
  except ValueError as error:
    raise FileExistsError(
      f"{file} can't be read ({error}), so the settings of the labels beside it"
      " are unknown. Remove the folder, or give another one."
    ) from error
  return content


def differences(stored: Any, requested: Any, path: str = "") -> Iterator[str]:
  """Lines such as "settings.threshold: 0.1 -> 0.2", key by key."""
  if not (isinstance(stored, Mapping) and isinstance(requested, Mapping)):
    if stored != requested:
      yield f"{path}: {_short(stored)} -> {_short(requested)}"
    return
  for key in [*stored, *(k for k in requested if k not in stored)]:
    inner = f"{path}.{key}" if path else str(key)
    if key not in requested:
      yield f"{inner}: {_short(stored[key])} -> none"
    elif key not in stored:
      yield f"{inner}: none -> {_short(requested[key])}"
    else:
      yield from differences(stored[key], requested[key], inner)


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def listed(lines: list[str]) -> str:
  """Differences for an error, one per line; the first ones of many."""
  more = len(lines) - _SHOWN
  shown = lines[:_SHOWN] + [f"... and {more} more"] * (more > 0)
  return "".join(f"\n  {line}" for line in shown)
