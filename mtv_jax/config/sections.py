"""Config sections: frozen dataclasses, read from and written to dicts.

A field is a key of the section. `options` checks its annotation, which may also
be a section, a `Duration`, or `Mapping[str, SECTION]` for named entries, whose
`type` defaults to their name:

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class CheckpointConfig:
    every: PositiveDuration = Duration(1000)
    keep: PositiveInt = 2
    options: Mapping[str, Any] = further_options()

None counts as absent. An absent section is read with its defaults, unless its
field has a default.
"""

import dataclasses
import functools
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
  """A field that is not a key but set after reading."""
  field_options = dict(compare=False, repr=False, metadata={_DERIVED: True})
  return dataclasses.field(default=None, **field_options)


class _Field:
  """A field of a section, with its annotation and keys."""

  def __init__(self, field: dataclasses.Field, hint: Any):
    self.name, self.hint, self.default = field.name, hint, field.default
    self.kinds, missing = {*field.metadata}, dataclasses.MISSING
    self.is_required = field.default is field.default_factory is missing
    is_union = typing.get_origin(hint) in options.UNIONS
    self.members = typing.get_args(hint) if is_union else (hint,)
    self.section: type | None = None  # The section among the members.
    self.units: tuple[str, ...] = ()  # A duration's.
    for member in self.members:
      notes = [member, *typing.get_args(member)]
      if Duration in notes:
        unit_names = (note.names for note in notes if isinstance(note, Units))
        self.units = next(unit_names, UNITS)
        self.bounds = [note for note in notes if isinstance(note, Range)]
      elif dataclasses.is_dataclass(member):
        self.section = member
    # The class of named entries.
    is_mapping, value_type = typing.get_origin(hint) is Mapping, notes[-1]
    has_entries = is_mapping and dataclasses.is_dataclass(value_type)
    self.entries = value_type if has_entries else None
    self.keys = [f"{self.name}_{unit}" for unit in self.units] or [self.name]


@functools.cache
def _fields(cls: type) -> list[_Field]:
  hints = options.get_annotations(cls)
  fields = (_Field(f, hints[f.name]) for f in dataclasses.fields(cls))
  return [field for field in fields if _DERIVED not in field.kinds]


def list_keys(cls: type) -> list[str]:
  """The keys of a section, except further options."""
  fields = (field for field in _fields(cls) if _FURTHER not in field.kinds)
  return [key for field in fields for key in field.keys]


def read(cls: type[T], entry: Any, where: str) -> T:
  """Reads a section from a dictionary; `where` is its key, for errors."""
  if not isinstance(entry, Mapping):
    shown = options.shorten_repr(entry)
    raise ConfigError(f"{where} is {shown}, expected a section (a dict).")
  values, unread, further_field = {}, dict(entry), None
  for field in _fields(cls):
    name, path = field.name, f"{where}.{field.name}"
    if _FURTHER in field.kinds:
      further_field = name
      continue
    values_by_key = {key: unread.pop(key, None) for key in field.keys}
    values_by_key = {
      key: value for key, value in values_by_key.items() if value is not None
    }
    if field.units and (values_by_key or field.is_required):
      values[name] = _read_duration(path, values_by_key, field)
    elif values_by_key:
      values[name] = _read_value(path, values_by_key[name], field)
    elif field.is_required:
      if not (field.section or field.entries):
        raise ConfigError(f"{path} is missing; it has no default.")
      values[name] = _read_value(path, {}, field)
    elif isinstance(field.default, Duration):
      values[name] = dataclasses.replace(field.default, name=path)
  if further_field:
    values[further_field] = unread
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
  out = {}
  for field in _fields(type(value)):
    item = getattr(value, field.name)
    if isinstance(item, Duration):
      out[f"{field.name}_{item.unit}"] = item.value
    elif _FURTHER in field.kinds:
      out |= to_dict(item)
    elif not (
      field.units or (_SPARSE in field.kinds and item == field.default)
    ):
      out[field.name] = to_dict(item)
  return out


def _read_value(path: str, value: Any, field: _Field) -> Any:
  if field.entries:
    return _read_entries(path, value, field.entries)
  if field.section is None:
    return options.check_value(value, field.hint, path)
  scalars = [m for m in field.members if m not in (field.section, type(None))]
  if scalars and not isinstance(value, Mapping):
    return options.check_value(value, typing.Union[*scalars], path)
  return read(field.section, value, path)


def _read_entries(path: str, value: Any, cls: type[T]) -> dict[str, T]:
  """Reads entries, sorted as in a `ConfigDict`, so that sums have one order.

  None removes an entry, for example on the command line.
  """
  if not isinstance(value, Mapping):
    shown = options.shorten_repr(value)
    raise ConfigError(f"{path} is {shown}, expected named entries (a dict).")
  has_type = "type" in list_keys(cls)
  entries = {}
  for name, entry in sorted(value.items()):
    if isinstance(entry, Mapping) and has_type:
      entry = {"type": name} | entry
    if entry is not None:
      entries[name] = read(cls, entry, f"{path}.{name}")
  return entries


def _read_duration(
  path: str, values: Mapping[str, Any], field: _Field
) -> Duration:
  if len(values) != 1:
    got = ", ".join(f"{k}={v}" for k, v in values.items()) or "none"
    keys = ", ".join(field.keys)
    raise ConfigError(f"{path}: set exactly one of {keys}; got {got}.")
  ((key, value),) = values.items()
  where, unit = f"{path.rpartition('.')[0]}.{key}", key.rpartition("_")[2]
  number = Annotated[float, *(field.bounds or [Range(min=0)])]
  options.check_value(value, number, where)
  if unit == "steps" and value != int(value):
    raise ConfigError(f"{where} is {value!r}, expected a whole number.")
  return Duration(value, unit, name=path)
