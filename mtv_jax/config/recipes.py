"""Recipes: config files whose `get_config` takes typed arguments."""

import pathlib
import runpy
from typing import Any

from ml_collections import ConfigDict

from mtv_jax import configs
from mtv_jax.config import overrides
from mtv_jax.utils.errors import ConfigError, did_you_mean


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parses the arguments after the colon in `--config=file.py:tiny,batch=64`.

  A bare name sets a bool to True. The defaults give the types; None allows any
  literal or string. Raises ConfigError for an unknown name or a wrong type.
  """
  out = dict(defaults)
  for part in filter(None, (p.strip() for p in (arg or "").split(","))):
    name, equals, text = part.partition("=")
    if name not in defaults:
      hint = did_you_mean(name, defaults)
      raise ConfigError(f"this config has no argument {name!r}. {hint}")
    default = defaults[name]
    if not equals and not isinstance(default, bool):
      raise ConfigError(f"argument {name!r} needs a value: {name}=...")
    key = f"argument {name}"
    out[name] = overrides.parse_value(text, default, key) if equals else True
    if isinstance(default, tuple) and not isinstance(out[name], list | tuple):
      raise ConfigError(f"{key}={text!r}; expected a list")
  return ConfigDict(out)


def read_config(path: str, **arguments: Any) -> ConfigDict:
  """Reads the config of a recipe.

  The path is a file or a packaged recipe, with arguments after a colon, such as
  `FOLDER/NAME.py` or `NAME:tiny,batch=64`. Raises ConfigError if it does not
  exist or lacks `get_config`.
  """
  name, _, arg = path.partition(":")
  file = pathlib.Path(name)
  if not file.is_file():
    folder = pathlib.Path(configs.__path__[0])
    recipes = sorted(file.stem for file in folder.glob("[!_]*.py"))
    # Outside a checkout, a file of `configs/` also names the packaged recipe.
    recipe = name.removeprefix("configs/").removesuffix(".py")
    if recipe not in recipes:
      # Files beside a misspelled one, with its folder as the user wrote it.
      files = file.parent.glob("*.py") if file.suffix == ".py" else ()
      others = [str(path) for path in files if path.stem not in recipes]
      hint = did_you_mean(name, [*recipes, *others])
      raise ConfigError(f"there is no config {name!r}. {hint}")
    file = folder / f"{recipe}.py"
  values = runpy.run_path(str(file))
  if "get_config" not in values:
    raise ConfigError(f"{file} defines no get_config(arg).")
  pairs = [arg, *(f"{key}={value}" for key, value in arguments.items())]
  return values["get_config"](",".join(filter(None, pairs)) or None)
