"""Heads on the towers, and the registry of prediction heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtv_jax.config import options
from mtv_jax.config.sections import Config
from mtv_jax.models.heads import caption_decoder, dpt, prompter
from mtv_jax.models.heads.base import PredictionHead
from mtv_jax.utils.errors import InputError, did_you_mean

# Keyed by the name that `Encoder.predict` takes.
HEADS: dict[str, type[PredictionHead]] = {
  "depth": dpt.DepthHead,
  "metric_depth": dpt.MetricDepthHead,
  "normals": dpt.NormalsHead,
  "segmentation": dpt.SegmentationHead,
  "grounding": prompter.GroundingHead,
  "locator": prompter.LocatorHead,
  "caption": caption_decoder.CaptionHead,
  "referring": caption_decoder.ReferringHead,
  "region_caption": caption_decoder.RegionCaptionHead,
}


def heads_of_config(
  objectives: Config, spec: Any, phrase_length: int | None = None
) -> dict[str, PredictionHead]:
  """Builds the prediction heads that `config.objectives` trains.

  `spec`: the `ModelSpec`. `phrase_length`: default for entries that omit it.
  """
  entries = {
    entry.get("type", name): (f"config.objectives.{name}", entry)
    for name, entry in objectives.items()
  }
  heads = {}
  for name, kind in HEADS.items():
    if kind.objective not in entries:
      continue
    where, entry = entries[kind.objective]
    fields = [field.name for field in dataclasses.fields(kind)]
    given = {k: v for k, v in entry.items() if k in fields}
    if "phrase_length" in fields and given.get("phrase_length") is None:
      given["phrase_length"] = phrase_length
    head = options.build(kind, given, where=where)
    if head.is_trained(name):
      heads[name] = head.resolve(spec)
  return heads


# Later options, omitted from exports at their defaults so that files stay
# unchanged and earlier versions can read them.
_LATER = ("scale", "head_features", "upsample", "activation", "phrase_length")


def describe_heads(heads: Mapping[str, PredictionHead]) -> dict[str, Any]:
  """Head options by objective, for an export's `mtv_jax.json`."""
  described = {}
  for head in heads.values():
    defaults = {f.name: f.default for f in dataclasses.fields(head)}
    described[head.objective] = {
      name: value
      for name, value in dataclasses.asdict(head).items()
      if name not in _LATER or value != defaults[name]
    }
  return described


def described_heads(described: Mapping[str, Any]) -> dict[str, PredictionHead]:
  """The inverse of `describe_heads`."""
  known = {kind.objective for kind in HEADS.values()}
  for name in described:
    if name not in known:
      raise InputError(
        f"The heads' description has {name!r}. {did_you_mean(name, known)}"
      )
  heads = {
    name: options.build(
      kind,
      described[kind.objective],
      where=f"the heads' description {kind.objective!r}",
    )
    for name, kind in HEADS.items()
    if kind.objective in described
  }
  return {name: head for name, head in heads.items() if head.is_trained(name)}


def contrastive_head(heads: Mapping[str, Any]) -> str:
  """Name of the head with the image-text temperature.

  Either 'contrastive', or the only head with a temperature. `heads`: parameters
  by head name.
  """
  scaled = [name for name, head in heads.items() if "logit_scale" in head]
  if "contrastive" in scaled:
    return "contrastive"
  if len(scaled) == 1:
    return scaled[0]
  raise InputError(
    "Expected one head with a temperature (logit_scale), or one named "
    f"'contrastive'; {scaled or 'none'} of {sorted(heads)} have one."
  )
