"""The former module of `recipes`, which users' recipes import."""

from mtv_jax.config.recipes import parse_arg, read_config

__all__ = ["parse_arg", "read_config"]
