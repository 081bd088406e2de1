"""The objectives, by the name that a config gives them."""

from __future__ import annotations

import dataclasses

from mtv_jax.config import schema
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
  options = {k: v for k, v in entry.items() if k not in ("type", "weight")}
  kind = entry.get("type", name)
  if kind not in REGISTRY:
    raise ConfigError(
      f"config.objectives.{name}: no objective of type '{kind}'. "
      f"{did_you_mean(kind, REGISTRY)}"
    )
  fields = [f.name for f in dataclasses.fields(REGISTRY[kind])]
  for key in options:
    if key not in fields:
      raise ConfigError(
        f"config.objectives.{name}: no option '{key}'. "
        f"{did_you_mean(key, ['weight', 'type', *fields])}"
      )
  return REGISTRY[kind](**options)
