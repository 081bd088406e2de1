"""Old names of objectives in configs, checkpoints, metrics and studies.

Earlier versions wrote them; readers of such files call these functions.
"""

from collections.abc import Container, Mapping
from typing import Any

from mtv_jax.utils.errors import ConfigError

# New to old names, for objective types and default entry names.
OLD_OBJECTIVES = {
  "dino": "distillation",
  "ibot": "masked_latent",
  "mae": "masked_pixels",
}
_NEW_OBJECTIVES = {old: new for new, old in OLD_OBJECTIVES.items()}


def rename_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
  """Renames a config's objectives to their new names; preserves the order."""
  objectives = config.get("objectives")
  if not isinstance(objectives, Mapping):
    return dict(config)
  renamed = {}
  for name, entry in objectives.items():
    new = new_name(name)
    has_type = isinstance(entry, Mapping) and "type" in entry
    if has_type and new_name(entry["type"]) != new:
      new = name  # An entry of another objective that has an old name.
    if new != name and new in objectives:
      names = f"{new!r} and {name!r}, its old name"
      raise ConfigError(f"config.objectives has {names}. Keep one of them.")
    if has_type:
      entry = {**entry, "type": new_name(entry["type"])}
    renamed[new] = entry
  return {**config, "objectives": renamed}


def rename_override(path: list[str | int]) -> list[str | int]:
  """Renames an override's key path, such as `objectives`, `dino`, `weight`."""
  if path[0] != "objectives" or len(path) == 1:
    return path
  return [path[0], new_name(path[1]), *path[2:]]


def rename_metric(name: str) -> str:
  """Renames a metric, such as `dino/loss`."""
  return "/".join(map(new_name, name.split("/")))


def rename_interference(row: Mapping[str, Any]) -> dict[str, Any]:
  """Renames the objectives in a row of `interference.jsonl`."""
  names = row.get("objectives")
  names = [*map(new_name, names)] if isinstance(names, list) else names
  return {**row, "objectives": names}


def find_stored_name(name: str, stored: Container[str]) -> str:
  """Name of an array in a checkpoint; some contain an objective's old name."""
  old = "/".join(OLD_OBJECTIVES.get(part, part) for part in name.split("/"))
  return old if name not in stored and old in stored else name


def name_in_key(objective: str) -> str:
  """Name to fold into random keys: the old name, for unchanged randomness."""
  return OLD_OBJECTIVES.get(objective, objective)


def new_name(name: Any) -> Any:
  """New name of an objective or type; returns any other value unchanged."""
  return _NEW_OBJECTIVES.get(name, name) if isinstance(name, str) else name
