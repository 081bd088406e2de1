"""Seeded mutations of valid files: of JSON values, of bytes, of file kinds."""

import copy
import json
import pathlib
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from hostile.samples import (
  BROKEN_BYTES,
  BROKEN_JSON,
  DAMAGED_BYTES,
  PLACES,
)

NAN, INF = float("nan"), float("inf")
# What JSON may hold where another value is expected.
VALUES = (
  None, True, False, 0, -1, 0.5, 1e308, -1e308, NAN, INF, 2**31, 2**63, 10**30,
  "", "x", "\0", "\ud800", "../x", "/etc/passwd", "<script>", "a" * 10_000,
  "%s{0}", [], [[]], [1, "x", None], {}, {"": None}, {"a": {"b": [1]}},
)  # fmt: skip
Mutation = Callable[[pathlib.Path], None]


def draw(name: str) -> random.Random:
  """A generator of random numbers of its own for each name."""
  return random.Random(zlib.crc32(name.encode()))


def json_paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
  """Paths of all values inside a JSON value."""
  children = ()
  if isinstance(value, dict):
    children = value.items()
  elif isinstance(value, list):
    # Lists of numbers may be long; their items are alike.
    children = enumerate(value[:3])
  for key, child in children:
    yield (*path, key)
    yield from json_paths(child, (*path, key))


def mutate_json(value: Any, rng: random.Random) -> tuple[str, Any]:
  """A name and a copy with one value replaced, removed, renamed or wrapped."""
  value = copy.deepcopy(value)
  path = rng.choice([*json_paths(value)])
  *parents, last = path
  inner = value
  for key in parents:
    inner = inner[key]
  change = rng.choice(["replace"] * 7 + ["remove", "rename", "wrap", "deep"])
  if change == "replace":
    inner[last] = new = rng.choice(VALUES)
    change = f"is {ascii(new)[:20]}"
  elif change == "wrap":
    inner[last] = [inner[last]]
  elif change == "deep":
    for _ in range(200):
      inner[last] = {"a": inner[last]}
  else:
    old = inner.pop(last)
    if change == "rename":
      isinstance(inner, dict) and inner.update({f"{last} ": old})
  return f"{'.'.join(map(str, path))} {change}", value


def json_mutations(
  file: str, value: Any, count: int, *, lines: bool = False
) -> dict[str, Mutation]:
  """Mutations of a JSON file, or of its last line, by name."""
  rng, named = draw(file), {}
  while len(named) < count:
    name, changed = mutate_json(value, rng)
    named[f"{file}: {name}"] = _write_json(file, changed, lines)
  for name, content in BROKEN_JSON.items():
    named[f"{file} is {name}"] = _write(file, content)
  return named | file_mutations(file)


def file_mutations(file: str) -> dict[str, Mutation]:
  """Mutations of a file's bytes, and of what stands in its place."""
  named: dict[str, Mutation] = {}
  for name, change in {**BROKEN_BYTES, **DAMAGED_BYTES}.items():
    named[f"{file}: {name}"] = _change_bytes(file, change)
  for name, make in PLACES.items():
    named[f"{file} is {name}"] = _replace(file, make)
  return named


def flip_byte(file: str, number: int) -> Mutation:
  """Changes one byte, drawn by the number, mostly near the start."""
  rng = draw(f"{file} {number}")

  def change(data: bytes) -> bytes:
    at = int(len(data) * rng.random() ** 4)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]

  return _change_bytes(file, change)


def _write_json(file: str, value: Any, lines: bool) -> Mutation:
  def mutate(folder: pathlib.Path) -> None:
    path, text = folder / file, json.dumps(value) + "\n"
    before = path.read_text() if lines else ""
    path.write_text(before + text)

  return mutate


def _write(file: str, content: bytes) -> Mutation:
  return lambda folder: (folder / file).write_bytes(content) and None


def _change_bytes(file: str, change: Callable[[bytes], bytes]) -> Mutation:
  def mutate(folder: pathlib.Path) -> None:
    path = folder / file
    path.write_bytes(change(path.read_bytes()))

  return mutate


def _replace(file: str, make: Callable[[pathlib.Path], Any]) -> Mutation:
  def mutate(folder: pathlib.Path) -> None:
    (folder / file).unlink()
    make(folder / file)

  return mutate
