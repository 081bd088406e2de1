"""Builds the expert for a folder or file of weights."""

import ast
import importlib
import inspect
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mtv_jax.config import foreign
from mtv_jax.data.labels.label_values import KINDS
from mtv_jax.encoder import loading
from mtv_jax.experts.base import Expert
from mtv_jax.experts.labelling.phrases import build_phrases
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  check_choice,
  did_you_mean,
)

# Modules by `model_type` in a Hugging Face folder's config.json.
_FAMILIES = {"depth_anything": "depth_anything", "owlv2": "owlv2"}
_PHRASE_LIMITS = ("max_phrases", "max_words")  # Options of `build_phrases`.


def build_expert(
  kind: str,
  weights: str | os.PathLike,
  *,
  options: Mapping[str, Any] | None = None,
) -> Expert:
  """Builds the expert for a kind of label from a folder or file of weights.

  `weights` is a Hugging Face folder (Depth Anything V2, OWLv2), an .onnx file,
  or a run or export of this package; for features, any folder that
  `mtv_jax.load` reads. Hub names (`ORG/NAME`) work too. `options` are passed to
  `load_expert`; `phrases` names a source, with the options of
  `build_phrases`.

  Raises:
    MissingFileError: the weights do not exist.
    InputError: the weights label a different kind, or an option is unknown.
    ImportError: a required package is not installed (the extra `onnx`).
  """
  check_choice("expert", kind, KINDS)
  path = path_lib.local_copy(loading.open_folder(weights)).expanduser()
  name, reason = _select_module(path)
  if kind == "features":
    name, reason = "feature_expert", ""
  module = importlib.import_module(f"mtv_jax.experts.{name}")
  parameters = inspect.signature(module.load_expert).parameters
  by_kind = getattr(module, "OPTIONS_BY_KIND", {})
  hidden = {"mesh", "kind"}.union(*(v for k, v in by_kind.items() if k != kind))
  option_names = [
    key
    for key, parameter in parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and key not in hidden
  ]
  arguments = dict(options or {})
  if isinstance(arguments.get("phrases"), str) and "phrases" in option_names:
    limits = {
      key: arguments.pop(key) for key in _PHRASE_LIMITS if key in arguments
    }
    arguments["phrases"] = build_phrases(arguments["phrases"], **limits)
  for key in arguments:
    if key not in option_names:
      raise InputError(
        f"The expert {name!r} has no option {key!r}. "
        f"{did_you_mean(key, option_names)}{reason}"
      )
  if "kind" in parameters:
    arguments["kind"] = kind
  expert = module.load_expert(path, **arguments)
  if expert.kind != kind:
    raise InputError(
      f"{path} labels {expert.kind}, not {kind}: pass --expert={expert.kind}, "
      "or other weights."
    )
  return expert


def _select_module(path: pathlib.Path) -> tuple[str, str]:
  """Returns the module that opens the weights, and why it was selected."""
  if not path.exists():
    raise MissingFileError(
      f"No weights at {path}. Expected: a folder of Depth Anything V2 or OWLv2"
      " (config.json, model.safetensors), an .onnx file, a run or export of"
      " this package, or a model of the hub (hf:ORG/NAME)."
    )
  if path.suffix == ".onnx":
    return "onnx_detector", ""
  file, families = path / "config.json", " or ".join(map(repr, _FAMILIES))
  if not path.is_dir():
    reason = f"it is a file, but not .onnx; for {families}, pass the folder."
  elif not file.is_file():
    reason = f"it lacks config.json, which {families} needs."
  else:
    try:
      content = foreign.read_object(file)
      family = foreign.read_field(content, "model_type", str, default=None)
    except InputError as error:
      reason = f"its config.json can't be read ({error}): copy it again."
    else:
      if family in _FAMILIES:
        return _FAMILIES[family], ""
      reason = f"its model_type is {family!r}, not {families}."
  # Appended to errors, in case the weights are an incomplete copy of an expert.
  return "mtv_expert", (
    f"\n{path} was opened as a run or export of this package: {reason}"
  )


def parse_options(assignments: Sequence[str]) -> dict[str, Any]:
  """Parses options `NAME=VALUE`; raises InputError if malformed."""
  options = {}
  for assignment in assignments:
    name, equals, text = assignment.partition("=")
    if not (name and equals):
      raise InputError(
        f"--set={assignment}: expected OPTION=VALUE, such as"
        " --set=min_side=0.02."
      )
    try:
      options[name] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      options[name] = text
  return options
