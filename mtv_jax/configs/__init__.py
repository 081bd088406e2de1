"""Recipes: the modules of `configs/` in a checkout, of this folder in a wheel.

A wheel has `configs/__init__.py` for this file (`package_dir` in setup.cfg).
"""

import pathlib

__path__ = [str(pathlib.Path(__file__).parents[2] / "configs")]
