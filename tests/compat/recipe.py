"""The resolved config of a run as a recipe: --config=recipe.py:config.json."""

import json
import pathlib

from ml_collections import ConfigDict


def get_config(arg):
  return ConfigDict(json.loads(pathlib.Path(arg).read_text()))
