"""Selection of the expert that reads a folder or file of weights."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtv_jax.data.labels.label_values import KINDS
from mtv_jax.experts.base import Expert
from mtv_jax.experts.labelling.phrases import build_phrases
from mtv_jax.utils.errors import InputError, MissingFileError, did_you_mean

# By the `model_type` of a Hugging Face folder's config.json.
_FAMILIES = {"depth_anything": "depth_anything.expert", "owlv2": "owlv2.expert"}
# Set by whoever runs the expert, and no option of a command.
_INTERNAL = ("mesh", "kind")


def build_expert(
  kind: str,
  weights: str | os.PathLike,
  *,
  options: Mapping[str, Any] | None = None,
) -> Expert:
  """The expert that a folder or file of weights is.

  Args:
    kind: of its labels, "depth" or "boxes".
    weights: a Hugging Face folder (Depth Anything V2, OWLv2), an .onnx file,
      or a run or export of this package.
    options: what `load_expert` of the expert's module takes; `phrases` by the
      name of their source (see `phrases`), with its own `max_phrases` and
      `max_words`. Only what is given is passed on.

  Raises:
    MissingFileError: there are no weights.
    InputError: the expert makes other labels, lacks an option or has no such.
    ImportError: a package that it needs is not installed (the extra `onnx`).
  """
  if kind not in KINDS:
    raise InputError(f"expert={kind!r}. {did_you_mean(str(kind), KINDS)}")
  path = pathlib.Path(weights).expanduser()
  name = _module_name(path)
  module = importlib.import_module(f"mtv_jax.experts.{name}")
  load = module.load_expert
  of_kind = getattr(module, "OF_KIND", {})
  others = {key for k, keys in of_kind.items() if k != kind for key in keys}
  parameters = {
    key: parameter
    for key, parameter in inspect.signature(load).parameters.items()
    if key not in others
  }
  given = _phrases(dict(options or {}), parameters)
  try:
    _check_options(given, parameters, name)
  except ValueError as error:
    if name == "mtv_expert":
      # Where weights of another expert are not whole, that is what is wrong.
      raise InputError(
        f"{error}\nThat expert is a run or export of this package, which"
        f" {path} was taken for: {_not_another(path)}"
      ) from error
    raise
  if "kind" in parameters:
    given["kind"] = kind
  expert = load(path, **given)
  if expert.kind != kind:
    raise InputError(
      f"{path} labels {expert.kind}, and {kind} was asked for: give"
      f" --expert={expert.kind}, or other weights."
    )
  return expert


def _module_name(path: pathlib.Path) -> str:
  """The module that opens these weights."""
  if not path.exists():
    raise MissingFileError(
      f"No weights at {path}. Expected are a folder of Depth Anything V2 or"
      " OWLv2 (config.json, model.safetensors), an .onnx file, or a run or"
      " export of this package."
    )
  if path.suffix == ".onnx":
    return "onnx.detector"
  try:
    config = json.loads((path / "config.json").read_bytes())
  except (OSError, ValueError):
    config = {}
  family = config.get("model_type") if isinstance(config, dict) else None
  # What neither is, `mtv_expert` says with all that it could have been.
  return _FAMILIES.get(family, "mtv_expert")


def _not_another(path: pathlib.Path) -> str:
  """Why weights are none of the experts that a config.json tells of."""
  file = path / "config.json"
  wanted = " or ".join(f"{family!r}" for family in _FAMILIES)
  if not path.is_dir():
    return f"it is a file, and no .onnx; of {wanted}, give the folder."
  if not file.is_file():
    return f"it has no config.json, which of {wanted} must be there."
  try:
    family = json.loads(file.read_bytes()).get("model_type")
  except (OSError, ValueError, AttributeError) as error:
    return f"its config.json can't be read ({error}): copy it again."
  return f"its model_type is {family!r}, not {wanted}."


def _phrases(
  given: dict[str, Any], parameters: Mapping[str, Any]
) -> dict[str, Any]:
  """The options with phrases instead of their name."""
  if not isinstance(given.get("phrases"), str) or "phrases" not in parameters:
    return given
  limits = {
    key: given.pop(key)
    for key in _keywords(build_phrases)
    if key in given and key not in parameters
  }
  return given | {"phrases": build_phrases(given["phrases"], **limits)}


def _check_options(
  given: Mapping[str, Any], parameters: Mapping[str, Any], name: str
) -> None:
  known = [
    key
    for key, parameter in parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and key not in _INTERNAL
  ]
  for key in given:
    if key not in known:
      raise InputError(
        f"The expert {name!r} has no option {key!r}. {did_you_mean(key, known)}"
      )
    _check_type(key, given[key], parameters[key].annotation)
  missing = [
    key
    for key in known
    if parameters[key].default is inspect.Parameter.empty and key not in given
  ]
  if missing:
    raise InputError(
      f"The expert {name!r} needs"
      f" {' and '.join(f'--{key}' for key in missing)}; given are"
      f" {', '.join(given) or 'no options'}."
    )


def _check_type(key: str, value: Any, annotation: Any) -> None:
  """Of an option of plain types; what others are is for the expert to say."""
  wanted = str(annotation).split(" | ")
  if not {*wanted} <= {"int", "float", "str", "None"}:
    return
  found = "None" if value is None else type(value).__name__
  if found not in wanted and not (found == "int" and "float" in wanted):
    raise InputError(f"{key}={value!r} is {found}, expected {annotation}.")


def parse_options(assignments: Sequence[str]) -> dict[str, Any]:
  """Options from a command line, `NAME=VALUE` each.

  Raises:
    InputError: one that is not.
  """
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


def _keywords(function: Callable[..., Any]) -> list[str]:
  return [
    key
    for key, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  ]
