"""Evaluation protocols over an `Encoder` and original images."""

from mtv_jax.evals.core.base import Evaluator, Result, build_evaluator

__all__ = ["Evaluator", "Result", "build_evaluator"]
