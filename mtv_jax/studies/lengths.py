"""Lengths of a study's runs, and the settings that scale with them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.config.durations import UNITS, Duration, RunLength
from mtv_jax.config.overrides import list_differences
from mtv_jax.studies.arms import count_records
from mtv_jax.train.config import RunConfig, WeightConfig
from mtv_jax.utils.errors import InputError

# Durations that scale with a run's total, by section, as regular expressions
# without units; starts of the optimizer's rules scale, too.
_DURATIONS = {
  r"schedule": ("warmup", "cooldown", "timescale"),
  r"objectives\.[^.]+\.weight": ("start", "ramp"),
  r"teachers\.[^.]+": ("update_every",),
}
_KEYS = "|".join(rf"{k}\.({'|'.join(n)})" for k, n in _DURATIONS.items())
# `set_length` leaves no epochs.
_SCALED = re.compile(
  rf"(?P<name>total|optim\.rules\.\d+\.start|{_KEYS})_(steps|examples)"
)


def read_length(config: RunConfig) -> RunLength:
  """The config's run length; opens the data if a duration is in epochs."""
  durations = [config.total, *_list_durations(config).values()]
  durations += [_read_start(entry) for _, entry in _read_rules(config)]
  in_epochs = any(d is not None and d.unit == "epochs" for d in durations)
  examples = sum(count_records(config)) if in_epochs else None
  return RunLength.of_total(config.total, config.batch_size, examples)


def set_length(
  config: RunConfig, length: RunLength, steps: int
) -> Iterable[str]:
  """Overrides that set the run length of an arm's config.

  Scales durations and starts of rules; percentages scale implicitly. Epochs
  become steps, since an arm with fewer distinct images has shorter epochs.
  """
  share, unit = steps / length.total_steps, config.total.unit
  if share != 1 or unit == "epochs":
    if unit != "steps":
      yield f"total_{unit}=None"
    yield f"total_steps={steps}"
  for name, duration in _list_durations(config).items():
    for key, value in _scale(name, duration, length, share).items():
      yield f"{key}={value}"
  rules = _read_rules(config)
  scaled = [
    (pattern, {**entry, **_scale("start", _read_start(entry), length, share)})
    for pattern, entry in rules
  ]
  if scaled != rules:
    yield f"optim.rules={scaled}"


def check_differ_in_length(
  arm: str, settings: Sequence[Mapping[str, Any]], advice: str
) -> None:
  """Raises InputError if an arm's settings differ in more than length and seed.

  Durations that scale with the length are compared as shares of it, within a
  step of each run. `advice` ends the message.
  """
  settings = [_index_rules(run) for run in settings]
  keys = [key for key, _ in list_differences(settings)]
  keys = [key for key in keys if not _SCALED.fullmatch(key) and key != "seed"]
  durations = [dict(_read_durations(s, s["batch_size"])) for s in settings]
  tolerance = sum(1 / steps["total"] for steps in durations)
  for key in dict.fromkeys(itertools.chain(*durations)):
    shares = [steps.get(key, 0) / steps["total"] for steps in durations]
    if np.ptp(shares) > tolerance:
      keys.append(key)
  if keys:
    raise InputError(
      f"the runs of {arm!r} differ in {', '.join(keys)}: {advice}"
    )


def _list_durations(config: RunConfig) -> dict[str, Duration | None]:
  """Durations that scale with a run's total, by key without unit."""
  sections = {"schedule": config.schedule}
  for name, entry in config.objectives.items():
    if isinstance(entry.weight, WeightConfig):
      sections[f"objectives.{name}.weight"] = entry.weight
  for name, teacher in config.teachers.items():
    sections[f"teachers.{name}"] = teacher
  return {
    f"{path}.{name}": getattr(section, name)
    for path, section in sections.items()
    for pattern, names in _DURATIONS.items()
    if re.fullmatch(pattern, path)
    for name in names
  }


def _read_rules(config: RunConfig) -> list[tuple[str, dict[str, Any]]]:
  """The optimizer's rules; empty if one is invalid, which a run reports."""
  rules = config.optim.rules
  is_valid = all(
    isinstance(r, list | tuple) and len(r) == 2 and isinstance(r[1], Mapping)
    for r in rules
  )
  return [tuple(rule) for rule in rules] if is_valid else []


def _read_start(rule: Mapping[str, Any]) -> Duration | None:
  """The start of an optimizer's rule, if set."""
  units = [unit for unit in UNITS if rule.get(f"start_{unit}")]
  return Duration(rule[f"start_{units[0]}"], units[0]) if units else None


def _index_rules(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Settings with the optimizer's rules as sections, by position."""
  optim = settings.get("optim") or {}
  rules = {
    str(i): {"pattern": pattern, **rule}
    for i, (pattern, rule) in enumerate(optim.get("rules") or ())
  }
  return {**settings, "optim": {**optim, "rules": rules}}


def _read_durations(
  section: Mapping[str, Any], batch_size: int, prefix: str = ""
) -> Iterator[tuple[str, float]]:
  """The set durations of `_SCALED` in steps, by key without unit."""
  for name, value in section.items():
    key = f"{prefix}{name}"
    if isinstance(value, Mapping):
      yield from _read_durations(value, batch_size, f"{key}.")
    elif (match := _SCALED.fullmatch(key)) and value:
      in_steps = key.endswith("_steps")
      yield match["name"], value if in_steps else value / batch_size


def _scale(
  key: str, duration: Duration | None, length: RunLength, share: float
) -> dict[str, int | None]:
  """Changes of a section that scale a duration, in steps, by `share`."""
  if duration is None or not duration.value or duration.unit == "percent":
    return {}
  if share == 1 and duration.unit != "epochs":
    return {}
  steps = max(round(length.steps(duration) * share), 1)
  return {f"{key}_{duration.unit}": None, f"{key}_steps": steps}
