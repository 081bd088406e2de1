"""Alias of `recipes`, for users' recipes that import the old name.

The schema of a config is the dataclass `train.run.RunConfig`; `sections` reads
it and rejects unknown keys.
"""

from mtv_jax.config.recipes import parse_arg, read_config

__all__ = ["parse_arg", "read_config"]
