"""The objectives, by the name that a config gives them."""

from __future__ import annotations

import dataclasses
import functools

from mtv_jax.config import schema
from mtv_jax.models.heads.base import PredictionHead
from mtv_jax.objectives import base
from mtv_jax.objectives.contrastive import Contrastive
from mtv_jax.objectives.depth import Depth
from mtv_jax.objectives.distillation import Distillation
from mtv_jax.objectives.grounding import Grounding
from mtv_jax.objectives.masked_latent import MaskedLatent
from mtv_jax.objectives.masked_pixels import MaskedPixels
from mtv_jax.utils.errors import ConfigError, did_you_mean

# A new objective is a new file and a line here.
REGISTRY: dict[str, type[base.Objective]] = {
  "contrastive": Contrastive,
  "depth": Depth,
  "grounding": Grounding,
  "masked_pixels": MaskedPixels,
  "distillation": Distillation,
  "masked_latent": MaskedLatent,
}


def build_objective(name: str, entry: schema.Config) -> base.Objective:
  """An objective from its entry in `config.objectives`.

  Args:
    name: the entry's name; also its type unless the entry says otherwise.
    entry: hyper-parameters. `weight` is the trainer's and not passed on.

  Raises:
    ConfigError: for an unknown type or an unknown hyper-parameter.
  """
  kind = entry.get("type", name)
  if kind not in REGISTRY:
    raise ConfigError(
      f"config.objectives.{name}: no objective of type '{kind}'. "
      f"{did_you_mean(kind, REGISTRY)}"
    )
  objective = REGISTRY[kind]
  options = {k: v for k, v in entry.items() if k not in ("type", "weight")}
  fields = _fields(objective)
  head = getattr(objective, "head", None)
  if isinstance(head, PredictionHead):
    # The options of the head stand in the same entry.
    of_head = {k: options.pop(k) for k in _fields(type(head)) if k in options}
    fields = [f for f in fields if f != "head"] + _fields(type(head))
    objective = functools.partial(
      objective, head=type(head).from_options(of_head)
    )
  for key in options:
    if key not in fields:
      raise ConfigError(
        f"config.objectives.{name}: no option '{key}'. "
        f"{did_you_mean(key, ['weight', 'type', *fields])}"
      )
  return objective(**options)


def _fields(cls: type) -> list[str]:
  return [field.name for field in dataclasses.fields(cls)]
