"""Typed arguments of recipes."""

import runpy

import pytest

from mtv_jax import configs
from mtv_jax.config import recipes
from mtv_jax.train.config import check_config
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


def test_settings_of_a_topology_are_for_its_recipe_alone(tmp_path):
  (tmp_path / "base.py").write_text("""
from mtv_jax.config.recipes import parse_arg, read_config
TOPOLOGIES = {"v5e:2x2": ("mesh.fsdp=2",)}
def get_config(arg=None):
  arg = parse_arg(arg, tokenizer="", batch=4)
  return read_config("siglip_b16_224", **arg)
""")
  (tmp_path / "own.py").write_text(f"""
from mtv_jax.config.recipes import parse_arg, read_config
def get_config(arg=None):
  return read_config("{tmp_path}/base.py")
""")

  def fsdp(recipe, topology="v5e:2x2"):
    config = recipes.read_config(f"{tmp_path}/{recipe}", topology=topology)
    return config.mesh.fsdp

  assert fsdp("base.py") == fsdp("base.py:tokenizer=a,data=b") == 2
  others = [fsdp("base.py:batch=8"), fsdp("own.py"), fsdp("base.py", "v5e:4x4")]
  assert others == [1, 1, 1]
  # Called by its own users, `get_config` returns a valid config.
  values = runpy.run_path(f"{configs.__path__[0]}/mtv_b16_224.py")
  check_config(values["get_config"]())
