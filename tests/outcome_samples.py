"""Results of encoders with invented numbers, for tests of reports."""

import dataclasses

from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome

DEPTH = Result(
  {"rmse": 0.5, "delta1": 0.75},
  {"encoder": "a", "data": "nyu", "data_hash": "1", "images": 20},
  {"rmse": 1.5},
  units={"rmse": "m"},
  lower=("rmse",),
  errors={"rmse": 0.03, "delta1": 0.02},
)
SHOT = Result(
  {"top1": 0.25},
  {"encoder": "a", "data_hash": "2", "size": (3, 4)},
  {"top1": 0.1},
)


def make_outcome(name, depth=0.5, **kwargs):
  depth = dataclasses.replace(
    DEPTH,
    metrics={"rmse": depth, "delta1": 0.75},
    protocol={**DEPTH.protocol, "encoder": name},
    sheets={},
  )
  shot = dataclasses.replace(SHOT, protocol={**SHOT.protocol, "encoder": name})
  fields = dict(results={"depth": depth, "shot": shot}, version="0")
  fields |= dict(protocol={"encoder": name}, weights="student") | kwargs
  return Outcome(name=name, encoder=name, **fields)
