"""Options of config entries, checked against annotations."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from mtv_jax.config import options
from mtv_jax.config.options import Fraction, PositiveFloat, PositiveInt
from mtv_jax.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Entry:
  """Every kind of annotation."""

  count: PositiveInt
  rate: float = 0.5
  share: Fraction = 0.1
  temperature: PositiveFloat | None = None
  method: Literal["auto", "ring", "gathered"] = "auto"
  taps: tuple[int, ...] | None = None
  range: tuple[float, float] = (0.0, 1.0)
  scale: float | int = 1
  names: Sequence[str] = ()
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  flag: bool = False
  anything: Any = None

  def __post_init__(self):
    if self.flag and self.count == 1:
      raise ConfigError("flag=True needs a count above 1.")


def build(**given):
  return options.build(Entry, given, where="config.x", reserved=("weight",))


@pytest.mark.parametrize(
  ("name", "given", "expected"),
  [
    ("rate", 1, 1.0),
    ("share", 1, 1.0),
    ("temperature", None, None),
    ("temperature", 2, 2.0),
    ("method", "ring", "ring"),
    ("taps", [1, 2], (1, 2)),
    ("range", [0, 2.5], (0.0, 2.5)),
    ("scale", 2, 2),
    ("scale", 2.0, 2.0),
    ("names", ["a"], ("a",)),
    ("sizes", {"a": 1}, {"a": 1}),
    ("flag", True, True),
    ("anything", [1], [1]),
  ],
)
def test_values_are_converted_to_their_annotation(name, given, expected):
  value = getattr(build(count=2, **{name: given}), name)
  assert value == expected
  assert type(value) is type(expected)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (dict(count="many"), "config.x.count is 'many', expected an integer >= 1."),
    (dict(count=0), "config.x.count is 0, expected an integer >= 1."),
    (dict(count=True), "config.x.count is True, expected an integer >= 1."),
    (dict(count=1.5), "config.x.count is 1.5, expected an integer >= 1."),
    (dict(), "config.x.count is missing; expected an integer >= 1."),
    (dict(rate="1"), "config.x.rate is '1', expected a number."),
    (dict(rate=float("nan")), "config.x.rate is nan, expected a number."),
    (dict(share=2), "config.x.share is 2, expected a number >= 0 and <= 1."),
    (dict(temperature=0), ".temperature is 0, expected a number > 0 or None."),
    (dict(method="rng"), "method is 'rng'. Did you mean 'ring'? There are: au"),
    (dict(method=3), "is 3, expected 'auto' or 'ring' or 'gathered'."),
    (
      dict(taps=(1, "2")),
      "(1, '2'), expected a list, each an integer or None.",
    ),
    (dict(range=(1,)), ".range is (1,), expected (a number, a number)."),
    (dict(names="a"), "config.x.names is 'a', expected a list, each a string."),
    (dict(sizes=[1]), "[1], expected a dictionary of an integer by a string."),
    (dict(flag=1), "config.x.flag is 1, expected True or False."),
    (dict(flag=True), "config.x: flag=True needs a count above 1."),
    (dict(tap=(1,)), "config.x has no option 'tap'. Did you mean 'taps'?"),
    (dict(wight=1.0), "no option 'wight'. Did you mean 'weight'? There are: "),
  ],
)
def test_errors_name_the_key_and_what_was_expected(given, message):
  given = {"count": 1, **given} if given else given
  with pytest.raises(ConfigError, match=re.escape(message)):
    build(**given)


def test_functions_and_classes_declare_options_too():
  def crop(size: PositiveInt, *, scale: float = 1.0):
    return size, scale

  class Source:
    def __init__(self, path: str, split: str | None = None):
      self.path, self.split = path, split

  assert options.build(crop, {"size": 2, "scale": 1}, where="op") == (2, 1.0)
  source = options.build(Source, {"path": "a"}, where="config.data.train[0]")
  assert (source.path, source.split) == ("a", None)
  with pytest.raises(ConfigError, match=r"config.data.train\[0\].path is 3"):
    options.build(Source, {"path": 3}, where="config.data.train[0]")


def test_an_entry_is_built_by_its_type():
  registry = {"entry": Entry, "fraction": "fractions:Fraction"}
  built = options.build_entry(
    registry, {"type": "entry", "count": 3, "weight": 2}, where="config.x",
    reserved=("weight",),
  )  # fmt: skip
  assert built == Entry(count=3)
  assert options.look_up(registry, "fraction", where="")(1, 2) == 0.5
  with pytest.raises(ConfigError, match="x.type is 'entri'. .*mean 'entry'"):
    options.build_entry(registry, {"type": "entri"}, where="config.x")
  with pytest.raises(ConfigError, match="x.type is missing. There are: entry"):
    options.build_entry(registry, {}, where="config.x")
