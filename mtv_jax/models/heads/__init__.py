"""Heads on the towers, and the registry of those that predict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtv_jax.config import schema as config_lib
from mtv_jax.models.heads.base import PredictionHead
from mtv_jax.models.heads.dpt import DepthHead
from mtv_jax.models.heads.prompter import GroundingHead, LocatorHead
from mtv_jax.utils.errors import did_you_mean

# By the name that `Encoder.predict` takes.
HEADS: dict[str, type[PredictionHead]] = {
  "depth": DepthHead,
  "grounding": GroundingHead,
  "locator": LocatorHead,
}


def heads_of_config(
  objectives: config_lib.Config, spec: Any
) -> dict[str, PredictionHead]:
  """The heads that a config's `objectives` train.

  Args:
    objectives: entries by name.
    spec: `two_tower.ModelSpec` of the model.
  """
  entries = {entry.get("type", n): entry for n, entry in objectives.items()}
  return {
    name: kind.from_options(entries[kind.objective], strict=False).resolve(spec)
    for name, kind in HEADS.items()
    if kind.objective in entries
  }


def describe_heads(heads: Mapping[str, PredictionHead]) -> dict[str, Any]:
  """Options by objective, for an export's `mtv_jax.json`."""
  return {head.objective: dataclasses.asdict(head) for head in heads.values()}


def described_heads(described: Mapping[str, Any]) -> dict[str, PredictionHead]:
  """The inverse of `describe_heads`.

  Raises:
    ValueError: for an unknown objective or option.
  """
  known = {kind.objective for kind in HEADS.values()}
  for name in described:
    if name not in known:
      raise ValueError(
        f"The description of the heads has {name!r}. "
        f"{did_you_mean(name, known)}"
      )
  return {
    name: kind.from_options(described[kind.objective])
    for name, kind in HEADS.items()
    if kind.objective in described
  }


def contrastive_head(heads: Mapping[str, Any]) -> str:
  """Name of the head with the temperature between images and texts.

  Args:
    heads: parameters by name.

  Raises:
    ValueError: where no head is called 'contrastive', and not exactly one has
      a temperature.
  """
  scaled = [name for name, head in heads.items() if "logit_scale" in head]
  if "contrastive" in scaled:
    return "contrastive"
  if len(scaled) == 1:
    return scaled[0]
  raise ValueError(
    f"Of the heads {sorted(heads)} these have a temperature (logit_scale): "
    f"{scaled}; expected one, or one called 'contrastive'."
  )
