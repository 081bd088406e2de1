"""Alias of `recipes`, for users' recipes that import the old name."""

from mtv_jax.config.recipes import parse_arg, read_config

__all__ = ["parse_arg", "read_config"]
