"""Readers of files in foreign formats."""

import json
import os
from collections.abc import Mapping

import pytest

from mtv_jax.config import foreign
from mtv_jax.config.options import PositiveFloat, PositiveInt
from mtv_jax.utils.errors import ConfigError, InputError


def test_fields_are_converted_or_named():
  content = {"width": 3, "eps": 1, "none": None, "names": {"a": "b"}}
  read = foreign.read_field
  assert read(content, "width", PositiveInt) == 3
  assert isinstance(read(content, "eps", PositiveFloat), float)
  # Null is as an absent key.
  assert read(content, "none", PositiveInt, default=7) == 7
  assert read(content, "names", Mapping[str, str]) == {"a": "b"}
  for key, kind, message in (
    ("width", str, r"^text\.width is 3, expected a string"),
    ("widht", PositiveInt, "widht is missing.*mean 'width'"),
    ("huge", PositiveFloat, "expected a number > 0"),
  ):
    with pytest.raises(InputError, match=message):
      read({**content, "huge": 10**400}, key, kind, where="text.")
  # A long value is cut.
  with pytest.raises(InputError) as error:
    read({"width": ["x" * 1000] * 1000}, "width", PositiveInt)
  assert len(str(error.value)) < 1000


def test_rows(tmp_path):
  content = {"rows": [{"id": 1, "name": "a"}, {"id": "b", "name": "c"}]}
  fields = {"id": (int, str), "name": str}
  assert foreign.read_rows("a.json", content, "rows", fields)
  for rows, message in (
    (None, "a.json: 'rows' is missing"),
    ([1], r"rows\[0\] is of type int"),
    ([{"id": 1}], r"rows\[0\] has no 'name', only \['id'\]"),
    ([{"id": True, "name": ""}], r"'id' of rows\[0\] is True.*int or str"),
  ):
    with pytest.raises(InputError, match=message):
      foreign.read_rows("a.json", {"rows": rows}, "rows", fields)


def test_names_stay_in_the_folder(tmp_path):
  resolve = foreign.resolve_name
  assert resolve(tmp_path, "a/./b.png", where="x") == tmp_path / "a" / "b.png"
  assert resolve(tmp_path, "a..b", where="x") == tmp_path / "a..b"
  for name in ("../a", "a/../../b", "/a", "", ".", None, 3, "a\0", "\ud800"):
    with pytest.raises(InputError, match="list.txt names the file"):
      resolve(tmp_path, name, where="list.txt")
  # The cache of the Hub links out of its folder.
  (tmp_path / "blob").write_text("x")
  (tmp_path / "snapshot").mkdir()
  os.symlink("../blob", tmp_path / "snapshot" / "a")
  path = resolve(tmp_path / "snapshot", "a", where="x")
  assert path.read_text() == "x"


def test_errors_name_the_file_once(tmp_path):
  with (
    pytest.raises(InputError, match=r"^a\.json: b$"),
    foreign.errors_of("a.json"),
    foreign.errors_of("a.json"),
  ):
    raise ConfigError("b")


def test_objects(tmp_path):
  path = tmp_path / "a.json"
  assert foreign.read_object(path) == {}
  path.write_text(json.dumps({"a": 1}), encoding="utf-8-sig")
  assert foreign.read_object(path) == {"a": 1}
  path.write_text("[" * 100_000)
  with pytest.raises(InputError, match="a.json is JSON that is nested too"):
    foreign.read_object(path)
  path.write_text("[1]")
  with pytest.raises(InputError, match="not a JSON object but a list"):
    foreign.read_object(path)
