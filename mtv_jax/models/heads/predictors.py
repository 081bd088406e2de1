"""How the heads of pretraining were configured that an encoder predicts with.

A small description: a run's config gives it, an export keeps it in its
`mtv_jax.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mtv_jax.models import two_tower as models
from mtv_jax.models.heads import dpt
from mtv_jax.utils.errors import did_you_mean


@dataclasses.dataclass(frozen=True)
class DepthHead:
  """How the head of the objective `depth` was configured.

  Attributes:
    taps: layers read, shallow to deep, from 0.
    features: see `dpt.DPT`.
    channels: see `dpt.DPT`.
    tap_norm: see `dpt.DPT`.
    size: side of the map; None for four times the patch grid, at most 112.
  """

  taps: tuple[int, ...]
  features: int
  channels: tuple[int, ...]
  tap_norm: str = "layer"
  size: int | None = None


@dataclasses.dataclass(frozen=True)
class GroundingHeads:
  """How the heads of the objective `grounding` were configured.

  Attributes:
    attention_heads: of prompter and locator.
  """

  attention_heads: int = 1


@dataclasses.dataclass(frozen=True)
class Predictors:
  """The heads that a model can predict with; None for those it has not."""

  depth: DepthHead | None = None
  grounding: GroundingHeads | None = None

  def to_dict(self) -> dict[str, Any]:
    """For JSON; the heads there are."""
    return {k: v for k, v in dataclasses.asdict(self).items() if v}

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Predictors:
    """The inverse of `to_dict`.

    Raises:
      ValueError: for a head or an option that there is not.
    """
    kinds = {"depth": DepthHead, "grounding": GroundingHeads}
    made = {}
    for name, options in fields.items():
      known = kinds if name not in kinds else _names(kinds[name])
      wrong = [name] if name not in kinds else set(options) - set(known)
      for key in wrong:
        raise ValueError(
          f"the heads' description has {key!r}. {did_you_mean(key, known)}"
        )
      made[name] = kinds[name](
        **{
          k: tuple(v) if isinstance(v, list) else v for k, v in options.items()
        }
      )
    return cls(**made)

  @classmethod
  def from_config(
    cls, objectives: Mapping[str, Any] | ConfigDict, spec: models.ModelSpec
  ) -> Predictors:
    """The heads of a config's `objectives`, on a model of this shape."""
    width, depth = spec.image.width, spec.image.depth
    made = {}
    for name, entry in objectives.items():
      kind = entry.get("type", name)
      if kind == "depth":
        made["depth"] = DepthHead(
          taps=tuple(entry.get("taps") or dpt.quarter_taps(depth)),
          features=entry.get("features") or dpt.default_features(width),
          channels=tuple(entry.get("channels") or dpt.default_channels(width)),
          tap_norm=entry.get("tap_norm", "layer"),
          size=entry.get("size"),
        )
      elif kind == "grounding":
        made["grounding"] = GroundingHeads(entry.get("attention_heads", 1))
    return cls(**made)


def _names(kind: type) -> list[str]:
  return [field.name for field in dataclasses.fields(kind)]
