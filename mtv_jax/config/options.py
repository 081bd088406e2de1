"""Options of config entries, checked against the annotations of a class.

Objectives, sources, optimizers, schedules, ops and evaluators declare their
options as annotated fields or parameters, against which `build` checks a config
entry's names, types and ranges:

  @dataclasses.dataclass(frozen=True)
  class Depth:
    scales: PositiveInt = 4
    trim: Fraction = 0.1
    tap_norm: Literal["layer", "none"] = "layer"
    taps: tuple[int, ...] | None = None

The type of an entry is a registered name, or `MODULE:NAME`, a class in a user's
module (a plug-in).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
import numbers
import os
import pathlib
import pkgutil
import re
import reprlib
import sys
import sysconfig
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from mtv_jax.utils import errors
from mtv_jax.utils.errors import ConfigError, InputError, did_you_mean

T = TypeVar("T")
UNIONS = (typing.Union, types.UnionType)
_SEQUENCES = (tuple, list, set, frozenset, Sequence)
_PLUGIN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_refuses_imports = contextvars.ContextVar("refuse_imports", default=False)


@dataclasses.dataclass(frozen=True)
class Range:
  """Bounds of a number: `Annotated[float, Range(min=0, max=1)]`.

  `above` and `below` are exclusive bounds.
  """

  min: float | int = -math.inf
  max: float | int = math.inf
  above: float | int = -math.inf
  below: float | int = math.inf

  def __contains__(self, value: float | int) -> bool:
    return self.min <= value <= self.max and self.above < value < self.below

  def __str__(self) -> str:
    lower = (">", self.above), (">=", self.min)
    bounds = *lower, ("<", self.below), ("<=", self.max)
    return " and ".join(f"{op} {x}" for op, x in bounds if math.isfinite(x))


PositiveInt = Annotated[int, Range(min=1)]
NonNegativeInt = Annotated[int, Range(min=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(min=0)]
Fraction = Annotated[float, Range(min=0, max=1)]
PositiveFraction = Annotated[float, Range(above=0, max=1)]
Side = Annotated[int, Range(min=1, max=1 << 13)]  # Pixels.


def build_entry(
  registry: Mapping[str, Any],
  entry: Mapping[str, Any],
  *,
  where: str,
  reserved: Sequence[str] = (),
  base: type | None = None,
) -> Any:
  """Builds a config entry whose key `type` names a class, see `look_up`."""
  factory = look_up(registry, entry.get("type"), where=where, base=base)
  return build(
    factory,
    {k: v for k, v in entry.items() if k not in ("type", *reserved)},
    where=where,
    reserved=("type", *reserved),
  )


def look_up(
  registry: Mapping[str, Any],
  name: str | None,
  *,
  where: str,
  key: str = "type",
  base: type | None = None,
) -> Any:
  """Looks up the factory of a type, `key` of the config entry `where`.

  A factory "package.module:Class" is imported on lookup. `base`: the class that
  plug-ins of this registry derive from; None allows no plug-ins.
  """
  if base is not None and isinstance(name, str) and ":" in name:
    return import_plugin(name, f"{where}.{key}", base)
  if name not in registry:
    problem = "is missing" if name is None else f"is {shorten_repr(name)}"
    hint = did_you_mean(str(name), registry)
    raise ConfigError(f"{where}.{key} {problem}. {hint}")
  factory = registry[name]
  return pkgutil.resolve_name(factory) if isinstance(factory, str) else factory


def is_plugin(name: Any) -> bool:
  """Whether a type is `MODULE:NAME`, the name of a user's class."""
  return isinstance(name, str) and _PLUGIN.fullmatch(name) is not None


def is_imported(plugin: str) -> bool:
  """Whether a module is imported and has the plug-in.

  Readers of files that others wrote use only plug-ins that the user imported.
  """
  module, _, name = plugin.partition(":")
  return hasattr(sys.modules.get(module), name)


def import_module(name: str, option: str) -> Any:
  """Imports a user's module; raises ConfigError if an import fails."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    is_missing = isinstance(error, ModuleNotFoundError) and (
      f"{name}.".startswith(f"{error.name}.")
    )
    reason = f"{name} can't be imported: {error}"
    if is_missing:
      reason = f"{error}. Add the module's folder to PYTHONPATH"
    raise ConfigError(f"{option}: {reason}.") from error


@contextlib.contextmanager
def refuse_imports() -> Iterator[None]:
  """Refuses plug-ins that are not imported, for configs read from files."""
  token = _refuses_imports.set(True)
  try:
    yield
  finally:
    _refuses_imports.reset(token)


def import_plugin(name: str, option: str, base: type | None = None) -> Any:
  """Imports the object `MODULE:NAME` that an option names.

  Raises ConfigError if it does not exist, is not a subclass of `base`, or may
  not be imported (`refuse_imports`).
  """
  option = f"{option}={name!r}"
  if not is_plugin(name):
    raise ConfigError(f"{option}: expected MODULE:NAME, as in Python.")
  path, _, attribute = name.partition(":")
  if _refuses_imports.get() and path not in sys.modules:
    raise ConfigError(
      f"{option}: {path} is imported only on request: add --plugin={path}."
    )
  module = import_module(path, option)
  if not hasattr(module, attribute):
    public = [key for key in vars(module) if not key.startswith("_")]
    hint = did_you_mean(attribute, public)
    raise ConfigError(f"{option}: {path} lacks {attribute!r}. {hint}")
  plugin = getattr(module, attribute)
  is_class = isinstance(plugin, type)
  if base is not None and not (is_class and issubclass(plugin, base)):
    raise ConfigError(
      f"{option}: {attribute} is not a subclass of {base.__module__}."
      f"{base.__name__}."
    )
  if dataclasses.is_dataclass(base) and not _is_decorated(plugin):
    raise ConfigError(
      f"{option}: {attribute} has annotations that are not options: decorate"
      " it with @dataclasses.dataclass(frozen=True)."
    )
  return plugin


def plugin_digest(config: Mapping[str, Any]) -> str:
  """Hash of the files of imported plug-ins that a config names; "" if none.

  Includes modules that they use, as their globals show, except modules of other
  installed packages.
  """
  queue = re.findall(r'"([\w.]+):\w+"', json.dumps(config, default=str))
  packages = {name.partition(".")[0] for name in queue}
  files: dict[str, pathlib.Path] = {}
  while queue:
    module = sys.modules.get(name := queue.pop())
    file = pathlib.Path(getattr(module, "__file__", None) or ".")
    is_user_code = name.partition(".")[0] in packages or not _is_installed(file)
    if name in files or file.suffix != ".py" or not is_user_code:
      continue
    files[name] = file
    for value in [*vars(module).values()]:
      is_module = isinstance(value, types.ModuleType)
      used = value.__name__ if is_module else getattr(value, "__module__", None)
      queue += [used] if isinstance(used, str) else []
  digest = hashlib.blake2b(digest_size=8)
  for name, file in sorted(files.items()):
    digest.update(f"{name}\n".encode() + file.read_bytes())
  return digest.hexdigest() if files else ""


def _is_installed(file: pathlib.Path) -> bool:
  roots = sysconfig.get_path("stdlib"), pathlib.Path(__file__).parents[1]
  is_package = {"site-packages", "dist-packages"} & {*file.parts}
  return bool(is_package) or any(map(file.is_relative_to, roots))


def _is_decorated(cls: type) -> bool:
  """Whether the annotations of a dataclass's subclass, if any, are fields."""
  is_dataclass = "__dataclass_fields__" in vars(cls)
  return is_dataclass or not inspect.get_annotations(cls)


def build(
  factory: Callable[..., T],
  options: Mapping[str, Any],
  *,
  where: str,
  reserved: Sequence[str] = (),
) -> T:
  """Calls a dataclass, a class or a function with checked options.

  Prefixes a ConfigError that the factory itself raises with `where`, the
  entry's config key. If an error names a field by the factory, such as
  "ViTSpec.gelu", the config key replaces the factory's name. `reserved` are
  further known keys of the entry, for errors.
  """
  parameters = inspect.signature(factory).parameters
  hints = get_annotations(factory)
  for name in options:
    if name not in parameters:
      hint = did_you_mean(name, [*reserved, *parameters])
      raise ConfigError(f"{where} has no option {name!r}. {hint}")
  for name, parameter in parameters.items():
    if parameter.default is parameter.empty and name not in options:
      kind = describe(hints.get(name, Any))
      raise ConfigError(f"{where}.{name} is missing; expected {kind}.")
  checked = {
    name: check_value(value, hints.get(name, Any), f"{where}.{name}")
    for name, value in options.items()
  }
  try:
    return factory(**checked)
  except (ConfigError, InputError) as error:
    message = str(error)
    # Dataclasses name their own fields: "ViTSpec.gelu".
    factory_prefix = f"{getattr(factory, '__name__', '')}."
    if message.startswith(factory_prefix):
      message = f"{where}.{message.removeprefix(factory_prefix)}"
    elif isinstance(error, InputError) or message.startswith("config."):
      raise
    else:
      message = f"{where}: {message}"
    raise type(error)(message) from error


def check_fields(instance: Any) -> None:
  """Checks and converts the fields of a frozen dataclass, as `build` does.

  For `__post_init__` of classes that may be constructed without `build`.
  """
  name = type(instance).__name__
  for field, hint in get_annotations(type(instance)).items():
    if typing.get_origin(hint) is not typing.ClassVar:
      value = check_value(getattr(instance, field), hint, f"{name}.{field}")
      object.__setattr__(instance, field, value)


def get_annotations(factory: Callable[..., Any]) -> dict[str, Any]:
  """The annotations of a factory's parameters, with their `Range`s."""
  while isinstance(factory, functools.partial):
    factory = factory.func
  if isinstance(factory, type) and not dataclasses.is_dataclass(factory):
    factory = factory.__init__
  return typing.get_type_hints(factory, include_extras=True)


def check_value(value: Any, annotation: Any, where: str) -> Any:
  """Converts a value to an annotation; raises ConfigError if it does not fit.

  An annotation is `int`, `float`, `bool`, `str`, `Literal`, a union, tuple or
  collection of these, `Annotated` with a `Range`, or a class. `where` is the
  value's config key, for the error.
  """
  if hasattr(value, "to_dict"):  # A ConfigDict.
    value = value.to_dict()
  try:
    return _convert(value, annotation)
  except (ValueError, OverflowError):  # An integer beyond all floats.
    pass
  choices, shown = _list_choices(annotation), shorten_repr(value)
  if choices and isinstance(value, str):
    raise ConfigError(f"{where} is {shown}. {did_you_mean(value, choices)}")
  raise ConfigError(f"{where} is {shown}, expected {describe(annotation)}.")


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 200, 200
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 20


def shorten_repr(value: Any) -> str:
  """`repr` of a value, with long and deep values abbreviated."""
  return errors.printable(_REPR.repr(value))


def _convert(value: Any, annotation: Any) -> Any:
  """Converts a value; raises ValueError if it does not fit."""
  origin = typing.get_origin(annotation)
  args = typing.get_args(annotation)
  if annotation is Any:
    return value
  if origin is Annotated:
    value = _convert(value, args[0])
    if any(isinstance(r, Range) and value not in r for r in args[1:]):
      raise ValueError
    return value
  if origin in UNIONS:
    # Try the value's own type first: 1 stays an int for `float | int`.
    for member in sorted(args, key=lambda m: m is not type(value)):
      try:
        return _convert(value, member)
      except ValueError:
        continue
    raise ValueError
  if annotation in (int, float):
    number = numbers.Integral if annotation is int else numbers.Real
    is_number = isinstance(value, number) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
      raise ValueError
    return annotation(value)
  if (kind := origin or annotation) in _SEQUENCES:
    if not isinstance(value, list | tuple):
      raise ValueError
    if kind is not tuple or args[-1:] in ((), (Ellipsis,)):
      args = [args[0] if args else Any] * len(value)
    if len(value) != len(args):
      raise ValueError
    return (tuple if kind is Sequence else kind)(map(_convert, value, args))
  if origin is Literal:
    fits = any(value == a and type(value) is type(a) for a in args)
  else:
    # `None`, `str`, `bool`, `dict`, and classes that only Python code passes.
    kind = types.NoneType if annotation is None else kind
    fits = not isinstance(kind, type) or isinstance(value, kind)
  if not fits:
    raise ValueError
  if isinstance(origin, type) and issubclass(origin, Mapping):
    key, item = args
    return {_convert(k, key): _convert(v, item) for k, v in value.items()}
  return value


def _list_choices(annotation: Any) -> tuple[str, ...]:
  """The strings that an annotation of choices allows, else ()."""
  origin = typing.get_origin(annotation)
  if origin is Literal:
    return typing.get_args(annotation)
  if origin in UNIONS:
    members = [_list_choices(a) for a in typing.get_args(annotation)]
    if str not in typing.get_args(annotation):
      return tuple(choice for member in members for choice in member)
  return ()


_DESCRIPTIONS = {
  Any: "any value",
  bool: "True or False",
  float: "a number",
  int: "an integer",
  str: "a string",
  types.NoneType: "None",
  os.PathLike: "a path",
}


def describe(annotation: Any) -> str:
  """Describes an annotation, as in "an integer >= 1" or "a number or None"."""
  origin = typing.get_origin(annotation)
  args = typing.get_args(annotation)
  if annotation in _DESCRIPTIONS:
    return _DESCRIPTIONS[annotation]
  if origin is Annotated:
    ranges = [str(r) for r in args[1:] if isinstance(r, Range)]
    return " ".join([describe(args[0]), *ranges])
  if origin in UNIONS:
    return " or ".join(dict.fromkeys(map(describe, args)))
  if origin is Literal:
    return " or ".join(map(repr, args))
  if origin is not None and issubclass(origin, Mapping):
    return f"a dictionary of {describe(args[1])} by {describe(args[0])}"
  if origin in _SEQUENCES:
    if origin is tuple and args[-1] is not Ellipsis:
      return f"({', '.join(map(describe, args))})"
    return f"a list, each {describe(args[0])}"
  return f"a {getattr(origin or annotation, '__name__', annotation)}"
