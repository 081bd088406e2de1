"""Heads on the towers, and the registry of prediction heads."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from mtv_jax.config import options
from mtv_jax.config.registry import LazyRegistry
from mtv_jax.config.sections import Config
from mtv_jax.models.heads.base import PredictionHead, UnloadedHead
from mtv_jax.utils.errors import ConfigError, InputError, did_you_mean

log = logging.getLogger(__name__)

_PACKAGE = "mtv_jax.models.heads"
# By the type of the objective that trains them.
_TRAINED = {
  "depth": f"{_PACKAGE}.dpt:DepthHead",
  "grounding": f"{_PACKAGE}.prompter:GroundingHead",
  "captioning": f"{_PACKAGE}.caption_decoder:CaptionHead",
  "next_token": f"{_PACKAGE}.language_model:LanguageHead",
}
# Heads of released models, which no objective trains, by their name in exports.
_RELEASED = {
  "metric_depth": f"{_PACKAGE}.dpt:MetricDepthHead",
  "normals": f"{_PACKAGE}.dpt:NormalsHead",
  "segmentation": f"{_PACKAGE}.dpt:SegmentationHead",
}
HEADS: LazyRegistry[type[PredictionHead]] = LazyRegistry(_TRAINED)
RELEASED: LazyRegistry[type[PredictionHead]] = LazyRegistry(_RELEASED)
_ALL: LazyRegistry[type[PredictionHead]] = LazyRegistry(_RELEASED | _TRAINED)
_TYPES = {path: name for name, path in (_RELEASED | _TRAINED).items()}


def head_type(head: PredictionHead) -> str:
  """A head's type: its objective's, or its class as `MODULE:NAME`."""
  for cls in type(head).__mro__:
    path = f"{cls.__module__}:{cls.__qualname__}"
    if path in _TYPES:
      return _TYPES[path]
    if not path.startswith("mtv_jax."):
      break
  return path


def heads_of_config(
  objectives: Config, spec: Any, phrase_length: int | None = None
) -> dict[str, PredictionHead]:
  """Builds the prediction heads that `config.objectives` trains.

  `spec`: the `ModelSpec`. `phrase_length`: length of the op `regions`, the
  default for entries that omit it; None if it is the text tower's, as in
  exports before this option. Returns heads by the name that `Encoder.predict`
  takes; a plug-in that is not imported becomes an `UnloadedHead`.
  """
  if spec is not None and spec.text and spec.text.length == phrase_length:
    phrase_length = None
  heads: dict[str, PredictionHead] = {}
  for name, entry in objectives.items():
    where = f"config.objectives.{name}"
    types = entry.get("type", name), entry.get("head")
    plugins = [*filter(options.is_plugin, types)]
    if unloaded := [p for p in plugins if not options.is_imported(p)]:
      heads |= _make_unloaded(unloaded[0])
    elif head_cls := _find_trained_head(*types, where=where):
      fields = [field.name for field in dataclasses.fields(head_cls)]
      head_options = {k: v for k, v in entry.items() if k in fields}
      has_length = head_options.get("phrase_length") is not None
      if "phrase_length" in fields and not has_length:
        head_options["phrase_length"] = phrase_length
      head = options.build(head_cls, head_options, where=where).resolve(spec)
      for key, new_head in head.predictions().items():
        old_head = heads.setdefault(key, new_head)
        if type(old_head) is not type(new_head):
          raise ConfigError(
            f"{where}: another objective predicts {key!r} too. Rename one of"
            " the two in its head's `predictions`."
          )
        heads[key] = new_head
  return heads


def _find_trained_head(
  objective: str, head: Any, *, where: str
) -> type[PredictionHead] | None:
  """The class of the head that an objective trains; None without one.

  `head` is the entry's option of that name, which may be a plug-in.
  """
  if options.is_plugin(head):
    return options.import_plugin(head, f"{where}.head", PredictionHead)
  if not options.is_plugin(objective):
    return HEADS.get(objective)
  cls = options.import_plugin(objective, f"{where}.type", object)
  default = getattr(cls, "head", None)
  return type(default) if isinstance(default, PredictionHead) else None


def _make_unloaded(
  plugin: str, fields: Mapping[str, Any] | None = None
) -> dict[str, PredictionHead]:
  module = plugin.partition(":")[0]
  log.warning(
    f"No imported module has {plugin}, so its head, if any, can't predict. To"
    f" use it, import {module} first (mtv-jax: --plugin={module})."
  )
  return {plugin: UnloadedHead(plugin, fields)}


def describe_heads(heads: Mapping[str, PredictionHead]) -> dict[str, Any]:
  """Head options by type, for an export's `mtv_jax.json`.

  Heads that only a run's config names, and that are not loaded, are left out.
  """
  by_type = {}
  for head in heads.values():
    if isinstance(head, UnloadedHead):
      by_type |= {head.plugin: head.fields} if head.fields is not None else {}
      continue
    by_type[head_type(head)] = dataclasses.asdict(head)
  return by_type


def described_heads(described: Mapping[str, Any]) -> dict[str, PredictionHead]:
  """The inverse of `describe_heads`.

  Imports no module that the description names, see `options.is_imported`.
  """
  heads: dict[str, PredictionHead] = {}
  for name, fields in described.items():
    where, head_cls = "the heads' description", _ALL.get(name)
    if ":" in name:  # Also for a local class, which can't be imported.
      if not options.is_imported(name):
        heads |= _make_unloaded(name, fields)
        continue
      head_cls = options.import_plugin(name, where, PredictionHead)
    if head_cls is None:
      raise InputError(
        f"The heads' description has {name!r}. {did_you_mean(name, _ALL)}"
      )
    head = options.build(head_cls, fields, where=f"{where} {name!r}")
    heads |= head.predictions()
  return heads


def contrastive_head(heads: Mapping[str, Any]) -> str:
  """Name of the head with the image-text temperature.

  Either 'contrastive', or the only head with a temperature. `heads`: parameters
  by head name.
  """
  names = [name for name, head in heads.items() if "logit_scale" in head]
  if "contrastive" in names:
    return "contrastive"
  if len(names) == 1:
    return names[0]
  raise InputError(
    "Expected one head with a temperature (logit_scale), or one named "
    f"'contrastive'; {names or 'none'} of {sorted(heads)} have one."
  )
