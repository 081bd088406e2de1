"""Metrics of a run: the clock, log lines and trackers.

This package does not import JAX; values may be JAX arrays. `MetricWriter`
passes a step's metrics to the trackers of `config.log.trackers`, which are
classes in `trackers.py`.
"""

from mtv_jax.train.metrics.chrono import Chrono, Rates
from mtv_jax.train.metrics.trackers import Tracker, build_trackers
from mtv_jax.train.metrics.writer import MetricWriter, setup_logging

__all__ = ["Chrono", "MetricWriter", "Rates", "Tracker"]
__all__ += ["build_trackers", "setup_logging"]
