"""Recipes: in `configs/` of a checkout, in this folder of a wheel.

In a wheel, `configs/__init__.py` replaces this file (`package_dir`, setup.cfg).
"""

import pathlib

__path__ = [str(pathlib.Path(__file__).parents[2] / "configs")]
