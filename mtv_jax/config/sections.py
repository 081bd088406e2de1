"""Config sections: frozen dataclasses, read from and written to dicts.

A field is a key of the section. `options` checks its annotation, which may also
be a section, a `Duration`, or `Mapping[str, SECTION]` for named entries, whose
`type` defaults to their name:

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class CheckpointConfig:
    every: PositiveDuration = Duration(1000)
    keep: PositiveInt = 2
    options: Mapping[str, Any] = further_options()

None counts as absent. An absent section has its defaults, unless its field has
a default.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from ml_collections import ConfigDict

from mtv_jax.config import options
from mtv_jax.config.durations import UNITS, Duration, Units
from mtv_jax.config.options import Range
from mtv_jax.utils.errors import ConfigError, did_you_mean

T = TypeVar("T")
Config = ConfigDict | Mapping[str, Any]
_FURTHER, _SPARSE, _DERIVED = "further", "sparse", "derived"


def further_options() -> Any:
  """A field for unknown keys of the section, checked later."""
  return dataclasses.field(default_factory=dict, metadata={_FURTHER: True})


def sparse(default: Any) -> Any:
  """A field that `to_dict` omits at its default."""
  return dataclasses.field(default=default, metadata={_SPARSE: True})


def derived() -> Any:
  """A field that is not a key; set after reading."""
  options = dict(compare=False, repr=False, metadata={_DERIVED: True})
  return dataclasses.field(default=None, **options)


def list_keys(cls: type) -> list[str]:
  """The keys of a section, except further options."""
  hints = options.annotations(cls)
  return [
    key
    for field in dataclasses.fields(cls)
    if not {_FURTHER, _DERIVED} & {*field.metadata}
    for key in _field_keys(field.name, hints[field.name])
  ]


def read(cls: type[T], entry: Any, where: str) -> T:
  """Reads a section from a dictionary; `where` is its key, for errors."""
  if not isinstance(entry, Mapping):
    raise ConfigError(f"{where} is {entry!r}, expected a section (a dict).")
  hints, unread = options.annotations(cls), dict(entry)
  values, further = {}, None
  for field in dataclasses.fields(cls):
    hint, path = hints[field.name], f"{where}.{field.name}"
    if _DERIVED in field.metadata:
      continue
    if _FURTHER in field.metadata:
      further = field.name
      continue
    keys = _field_keys(field.name, hint)
    given = {key: unread.pop(key, None) for key in keys}
    given = {key: value for key, value in given.items() if value is not None}
    if _units(hint) and (given or not _has_default(field)):
      values[field.name] = _read_duration(path, given, hint, keys)
    elif given:
      values[field.name] = _read_value(path, given[field.name], hint)
    elif not _has_default(field):
      if not (_section_of(hint) or _entry_class(hint)):
        raise ConfigError(f"{path} is missing; it has no default.")
      values[field.name] = _read_value(path, {}, hint)
    elif isinstance(field.default, Duration):
      values[field.name] = dataclasses.replace(field.default, name=path)
  if further:
    values[further] = unread
  elif unread:
    key = next(iter(unread))
    hint = did_you_mean(key, list_keys(cls))
    raise ConfigError(f"{where}.{key} is an unknown key. {hint}")
  try:
    return cls(**values)
  except ConfigError as error:
    if str(error).startswith("config"):
      raise
    raise ConfigError(f"{where} {error}") from error


def to_dict(value: Any) -> Any:
  """The inverse of `read`: dictionaries and lists; also of a `ConfigDict`."""
  if isinstance(value, ConfigDict):
    value = value.to_dict()
  if isinstance(value, Mapping):
    return {key: to_dict(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_dict(item) for item in value]
  if not dataclasses.is_dataclass(value):
    return value
  hints, out = options.annotations(type(value)), {}
  for field in dataclasses.fields(value):
    item = getattr(value, field.name)
    if _DERIVED in field.metadata:
      continue
    if isinstance(item, Duration):
      out[f"{field.name}_{item.unit}"] = item.value
    elif _FURTHER in field.metadata:
      out |= to_dict(item)
    elif not _units(hints[field.name]) and not (
      _SPARSE in field.metadata and item == field.default
    ):
      out[field.name] = to_dict(item)
  return out


def _has_default(field: dataclasses.Field) -> bool:
  missing = dataclasses.MISSING
  return field.default is not missing or field.default_factory is not missing


def _members(hint: Any) -> tuple[Any, ...]:
  """The members of a union, or the annotation itself."""
  is_union = typing.get_origin(hint) in options.UNIONS
  return typing.get_args(hint) if is_union else (hint,)


def _units(hint: Any) -> tuple[str, ...]:
  """The units of a duration's annotation; empty if it is not one."""
  for member in _members(hint):
    if member is Duration:
      return UNITS
    if Duration in typing.get_args(member):
      notes = typing.get_args(member)
      return next((n.names for n in notes if isinstance(n, Units)), UNITS)
  return ()


def _field_keys(name: str, hint: Any) -> list[str]:
  return [f"{name}_{unit}" for unit in _units(hint)] or [name]


def _section_of(hint: Any) -> type | None:
  """The section among the members of an annotation."""
  return next(filter(dataclasses.is_dataclass, _members(hint)), None)


def _entry_class(hint: Any) -> type | None:
  """The class of named entries, if the annotation has them."""
  arguments = typing.get_args(hint)
  is_section = arguments and dataclasses.is_dataclass(arguments[-1])
  is_mapping = typing.get_origin(hint) is Mapping
  return arguments[-1] if is_mapping and is_section else None


def _read_value(path: str, value: Any, hint: Any) -> Any:
  """Checks and reads a key's value."""
  if cls := _entry_class(hint):
    return _read_entries(path, value, cls)
  if (section := _section_of(hint)) is None:
    return options.check_value(value, hint, path)
  others = [m for m in _members(hint) if m not in (section, type(None))]
  if others and not isinstance(value, Mapping):
    return options.check_value(value, typing.Union[*others], path)
  return read(section, value, path)


def _read_entries(path: str, value: Any, cls: type[T]) -> dict[str, T]:
  """Reads entries, sorted as in a `ConfigDict` so that sums have one order.

  None removes an entry, for example on the command line.
  """
  if not isinstance(value, Mapping):
    raise ConfigError(f"{path} is {value!r}, expected named entries (a dict).")
  has_type = any(field.name == "type" for field in dataclasses.fields(cls))
  entries = {}
  for name, entry in sorted(value.items()):
    if isinstance(entry, Mapping) and has_type:
      entry = {"type": name} | entry
    if entry is not None:
      entries[name] = read(cls, entry, f"{path}.{name}")
  return entries


def _read_duration(
  path: str, given: Mapping[str, Any], hint: Any, keys: list[str]
) -> Duration:
  """Reads the duration from one of its keys."""
  if len(given) != 1:
    got = ", ".join(f"{k}={v}" for k, v in given.items()) or "none"
    keys = ", ".join(keys)
    raise ConfigError(f"{path}: give exactly one of {keys}; got {got}.")
  ((key, value),) = given.items()
  notes = (note for m in _members(hint) for note in typing.get_args(m))
  bounds = [note for note in notes if isinstance(note, Range)]
  where, unit = f"{path.rpartition('.')[0]}.{key}", key.rpartition("_")[2]
  number = Annotated[float, *(bounds or [Range(min=0)])]
  options.check_value(value, number, where)
  if unit == "steps" and value != int(value):
    raise ConfigError(f"{where} is {value!r}, expected a whole number.")
  return Duration(value, unit, name=path)
