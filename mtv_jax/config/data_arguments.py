"""Arguments of every recipe that name the data of a run and its evaluations.

`read_config` applies them to the config that a recipe returns, unless the
recipe has an argument of that name. docs/data.md describes each.

If data, val or a benchmark is passed, the recipe's evaluations on scenes, on
its own training data, and on other benchmarks are removed.
"""

import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from mtv_jax.config.op_strings import parse_ops
from mtv_jax.utils.errors import ConfigError

log = logging.getLogger(__name__)

# Evaluations on each benchmark, with their interval in percent of the run: 10,
# as in DINOv2, and 50 for probes that train long.
_BENCHMARKS: dict[str, dict[str, int]] = {
  "imagenet": dict(zero_shot=10, knn=10, feature_rank=10, linear_probe=50),
  "coco": dict(retrieval=10, grounding=10),
  "nyu": dict(depth_probe=50, relative_depth=10),
  "ade20k": dict(segmentation=50),
  "davis": dict(video_segmentation=50),
  "navi": dict(geometric_correspondence=10),
  "spair": dict(semantic_correspondence=10),
}
_VAL = ("zero_shot", "knn", "retrieval", "grounding", "relative_depth")
# What a run must train for an evaluation: a text tower, or an objective.
_NEEDS = dict(zero_shot="text", retrieval="text", grounding="grounding")
_NEEDS |= dict(relative_depth="depth", captioning="captioning")
# Op that reads the labels of an objective.
_LABEL_OPS = dict(depth="depth", grounding="regions")
_LABELS = dict(depth="depth", grounding="boxes")
_DATA = "/data/"  # Where recipes expect the benchmarks.
# A run with fewer steps is evaluated only after the last step.
_SHORT_RUN = 1000
ARGUMENTS = ("data", "images", "depth", "boxes", "val", "val_images")
ARGUMENTS += ("val_boxes", *_BENCHMARKS)


def benchmarks(config: ConfigDict, *names: str) -> dict[str, dict[str, Any]]:
  """Entries of `config.evals` on benchmarks in /data/NAME.

  Leaves out evaluations of what the config does not train.
  """
  return _make_evaluations(config, {name: f"{_DATA}{name}" for name in names})


def _make_evaluations(
  config: ConfigDict, paths: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
  types = _list_trained(config)
  return {
    name: dict(type=name, data=path) | _make_interval(config, percent)
    for benchmark, path in paths.items()
    for name, percent in _BENCHMARKS[benchmark].items()
    if _NEEDS.get(name) in (None, *types)
  }


def apply_data_arguments(
  config: ConfigDict, given: Mapping[str, str]
) -> ConfigDict:
  """Applies data arguments to a recipe's config; returns it."""
  sources = {str(entry.get("path")) for entry in config.data.train}
  given = {name: os.path.expanduser(path) for name, path in given.items()}
  _check_arguments(config, given)
  _replace_data(config, given)
  has_user_data = given.get("data", "scenes") != "scenes"
  if has_user_data or {"val", *_BENCHMARKS} & {*given}:
    _replace_evaluations(config, given, sources)
  return config


def _check_arguments(config: ConfigDict, args: Mapping[str, str]) -> None:
  """Raises ConfigError for arguments that nothing reads."""
  requirements = dict(images="data", val_images="val", val_boxes="val")
  for part, name in requirements.items():
    if part in args and name not in args:
      raise ConfigError(f"{part}= belongs to {name}=: pass both.")
  for kind, name in [*_LABELS.items(), ("grounding", "val_boxes")]:
    if name in args and kind not in _list_trained(config):
      raise ConfigError(f"{name}={args[name]}: no objective reads it.")
  for name in _BENCHMARKS:
    if name in args and not _make_evaluations(config, {name: args[name]}):
      raise ConfigError(
        f"{name}={args[name]}: no evaluation on {name} applies to this recipe."
      )


def _replace_data(config: ConfigDict, args: Mapping[str, str]) -> None:
  labels = {k: args[k] for k in ("depth", "boxes") if k in args}
  if "data" in args:
    options = {k: args[k] for k in ("images",) if k in args}
    if "text" not in _list_trained(config):
      options["captions"] = "ignored"
    entry = dict(path=args["data"]) | options
    config.data.train = [entry | (dict(labels=labels) if labels else {})]
    if args["data"] == "scenes":
      config.data.train = [dict(type="scenes")]
    else:
      _drop_objectives(config, labels)
  elif labels:
    entry = dict(config.data.train[0])
    labels = dict(entry.get("labels") or {}) | labels
    config.data.train = [entry | dict(labels=labels), *config.data.train[1:]]


def _replace_evaluations(
  config: ConfigDict, arguments: Mapping[str, str], sources: Collection[str]
) -> None:
  """Replaces evaluations on scenes, `sources` and other benchmarks."""
  paths = {name: arguments[name] for name in _BENCHMARKS if name in arguments}
  old, evals = config.to_dict().get("evals") or {}, {}
  for name, entry in old.items():
    data = (entry or {}).get("data")
    if benchmark := _find_benchmark(data):
      if benchmark in paths:
        evals[name] = entry | dict(data=paths[benchmark])
    elif not (_is_scenes(data) or str(data) in sources):
      evals[name] = entry
  evals |= _make_evaluations(config, paths)
  for name in _VAL if "val" in arguments else ():
    if _NEEDS.get(name) in (None, *_list_trained(config)):
      entry = dict(type=name, data=arguments["val"], optional=True)
      if "val_boxes" in arguments and name == "grounding":
        labels = dict(boxes=arguments["val_boxes"])
        entry["data"] = dict(path=arguments["val"], labels=labels)
      if "val_images" in arguments and name in ("retrieval", "grounding"):
        entry["images"] = arguments["val_images"]
      evals[f"val_{name}"] = entry | _make_interval(config, 10)
  removed = {*old} - {*evals}
  hint = "Name held-out data (val=PATH) or benchmarks"
  if "val" in arguments:  # Its evaluations replace the ones on scenes.
    data = {name: (old[name] or {}).get("data") for name in removed}
    removed = {name for name in removed if _find_benchmark(data[name])}
    hint = "Name benchmarks"
  if removed:
    log.warning(
      f"Evaluations without data are removed: {', '.join(sorted(removed))}."
      f" {hint} (imagenet=PATH, coco=PATH, ...)."
    )
  config.evals = evals


def _find_benchmark(data: Any) -> str | None:
  name = str(data).removeprefix(_DATA)
  return name if str(data) == f"{_DATA}{name}" and name in _BENCHMARKS else None


def _is_scenes(data: Any) -> bool:
  kind = data.get("type", "") if isinstance(data, Mapping) else data
  return kind in (None, "scenes")


def _list_trained(config: ConfigDict) -> set[str]:
  """Types of the objectives, and `text` for a text tower."""
  objectives = (config.get("objectives") or {}).items()
  types = {entry.get("type", name) for name, entry in objectives if entry}
  return types | ({"text"} if config.model.get("text") else set())


def _make_interval(config: ConfigDict, percent: int) -> dict[str, int]:
  steps = config.get("total_steps")
  return {} if steps and steps < _SHORT_RUN else dict(every_percent=percent)


def _drop_objectives(config: ConfigDict, labels: Mapping[str, str]) -> None:
  unlabelled = [
    (name, entry.get("type", name))
    for name, entry in config.objectives.items()
    if entry and _LABELS.get(entry.get("type", name), "") not in ("", *labels)
  ]
  if not unlabelled:
    return
  for name, _ in unlabelled:
    del config.objectives[name]
  ops = {_LABEL_OPS[kind] for _, kind in unlabelled}
  if "captioning" in _list_trained(config):
    ops.discard("regions")
  texts = [str(op) for op in parse_ops(config.data.ops) if op.name not in ops]
  config.data.ops = "|".join(texts)
  names = " and ".join(name for name, _ in unlabelled)
  arguments = " and ".join(f"{_LABELS[kind]}=LABELS" for _, kind in unlabelled)
  log.warning(
    f"The data lack labels for {names}, which are left out. Pass {arguments}"
    " (`mtv-jax label` makes them)."
  )
