"""Registry of the objectives by config type."""

from __future__ import annotations

import dataclasses

from mtv_jax.config import options as options_lib
from mtv_jax.config.registry import LazyRegistry
from mtv_jax.config.sections import Config
from mtv_jax.models.heads.base import PredictionHead
from mtv_jax.objectives import base

# To add an objective, add a file and a line here, and a line in
# `models.heads.HEADS` if it trains a prediction head.
_CLASSES = {
  "contrastive": "Contrastive",
  "captioning": "Captioning",
  "next_token": "NextToken",
  "dino": "DINO",
  "ibot": "IBOT",
  "mae": "MAE",
  "lejepa": "LeJEPA",
  "gram": "Gram",
  "grounding": "Grounding",
  "depth": "Depth",
  "feature_distillation": "FeatureDistillation",
}
REGISTRY: LazyRegistry[type[base.Objective]] = LazyRegistry(
  {name: f"mtv_jax.objectives.{name}:{cls}" for name, cls in _CLASSES.items()}
)


def objective_class(kind: str, *, where: str) -> type[base.Objective]:
  """Returns the class of a registered type or, for plug-ins, `MODULE:NAME`."""
  return options_lib.look_up(REGISTRY, kind, where=where, base=base.Objective)


def build_objective(name: str, entry: Config) -> base.Objective:
  """Builds an objective from its entry in `config.objectives`.

  The type defaults to the name. The entry sets hyper-parameters of the
  objective and its prediction head; the trainer reads `weight`.
  `head="MODULE:NAME"` replaces the objective's prediction head with a user's.

  Raises ConfigError for an unknown type, or a hyper-parameter that is unknown,
  of the wrong type or out of range.
  """
  where = f"config.objectives.{name}"
  cls = objective_class(entry.get("type", name), where=where)
  options = {k: v for k, v in entry.items() if k not in ("type", "weight")}
  reserved = ["type", "weight"]
  default_head = getattr(cls, "head", None)
  if isinstance(default_head, PredictionHead):
    head_cls = type(default_head)
    if (plugin := options.pop("head", None)) is not None:
      head_base = options_lib.get_annotations(cls)["head"]
      head_cls = options_lib.import_plugin(plugin, f"{where}.head", head_base)
    fields = [field.name for field in dataclasses.fields(head_cls)]
    reserved += fields
    head_options = {k: options.pop(k) for k in fields if k in options}
    options["head"] = options_lib.build(head_cls, head_options, where=where)
  return options_lib.build(cls, options, where=where, reserved=reserved)
