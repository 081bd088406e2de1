"""Typed arguments of recipes."""

import pytest

from mtv_jax.config import recipes, schema
from mtv_jax.utils.errors import ConfigError


def test_parse_arg():
  defaults = {"tiny": False, "batch": 8, "lr": 1.0, "path": "a", "any": None}
  parse = recipes.parse_arg
  assert parse(None, **defaults).to_dict() == defaults
  got = parse("tiny, batch=64,lr=1,path=3,any=x", **defaults)
  assert got.to_dict() == {
    "tiny": True,
    "batch": 64,
    "lr": 1.0,
    "path": "3",
    "any": "x",
  }
  assert isinstance(got.lr, float)
  assert parse("tiny=false", tiny=True).tiny is False
  with pytest.raises(ConfigError, match="'tinny'. Did you mean 'tiny'"):
    parse("tinny", **defaults)
  with pytest.raises(ConfigError, match="'batch' needs a value"):
    parse("batch", **defaults)
  with pytest.raises(ConfigError, match="a='foo'; expected a list"):
    parse("a=foo", a=(1, 2))
  for bad in ("batch=x", "batch=1.5", "batch=True", "tiny=1"):
    with pytest.raises(ConfigError, match="expected"):
      parse(bad, **defaults)


def test_misspelled_configs_are_suggested(tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match="Did you mean 'siglip_b16_224'"):
    recipes.read_config("configs/sigllip_b16_224.py:tiny")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").touch()
  for folder in ("", f"{tmp_path}/"):
    with pytest.raises(ConfigError, match=f"Did you mean '{folder}mine.py'"):
      recipes.read_config(f"{folder}minne.py")


def test_recipes_written_for_the_former_module_run():
  assert schema.parse_arg is recipes.parse_arg
  assert schema.read_config is recipes.read_config


def test_settings_of_a_topology_precede_overrides():
  name = "mtv_b16_224"
  plain = recipes.read_config(name)
  tuned = recipes.read_config(name, topology="v5e:16x16")
  assert (plain.mesh.fsdp, tuned.mesh.fsdp) == (1, 8)
  assert (plain.model.remat, tuned.model.remat[:11]) == ("full", "full|image=")
  for config in (plain, tuned):
    assert "topologies" not in config
  other = recipes.read_config(f"{name}:batch=64", topology="v5e:16x16")
  assert other.model.remat == "full"
