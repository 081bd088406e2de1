"""Native folders: `params.safetensors`, `mtv_jax.json`, tokenizer files.

They contain models that no `transformers` class can (a CLIP with its position
folded into the CLS token) under our names. A Hugging Face export has the same
`mtv_jax.json`, from which `huggingface.read` restores the model.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import folders
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.convert.tables import ConversionError
from mtv_jax.models import heads as heads_lib
from mtv_jax.models import two_tower as models
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.errors import did_you_mean
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

PARAMS = "params.safetensors"
DESCRIPTION = "mtv_jax.json"
_FORMAT = 1
_TOKENIZER_CONFIG = "tokenizer_config.json"
_WRITTEN = (PARAMS, "tokenizer.json", "spiece.model", _TOKENIZER_CONFIG)


def write(folder: str | os.PathLike, model: ConvertedModel) -> pathlib.Path:
  """Writes any model as a native folder, for `read` and training's init.

  Args:
    folder: new, empty, or of an earlier conversion, which it replaces.
    model: any kind of model.
  """
  path = pathlib.Path(folder)
  leaves = numpy_leaves(model.params)
  check_params(model.spec, leaves)
  prepare_folder(path, _WRITTEN, tokenizer=model.tokenizer)
  folders.write_tensors(path / PARAMS, leaves)
  tokenizer = copy_tokenizer(path, model.tokenizer)
  write_description(path, dataclasses.replace(model, tokenizer=tokenizer))
  return path


def read(folder: pathlib.Path) -> ConvertedModel:
  """Reads a native folder."""
  description = read_description(folder)
  with folders.TensorFiles(folder / PARAMS) as store:
    leaves = {name: store.read(name) for name in store.names}
  return restore_model(folder, description, leaves)


def write_description(
  folder: pathlib.Path, model: ConvertedModel, **fields: Any
) -> None:
  """Writes `mtv_jax.json`; the model's tokenizer is in the folder."""
  description = {
    "format": _FORMAT,
    "model": model.spec.to_dict(),
    "preprocess": model.preprocess,
    **fields,
  }
  if model.tokenizer is not None:
    path = model.tokenizer.path
    description["tokenizer"] = {
      "file": path and path.name,
      "clean": model.tokenizer.clean,
    }
    if path is None and model.tokenizer.built_in != "bytes":
      description["tokenizer"]["built_in"] = model.tokenizer.built_in
  if model.weights != "student":
    description["weights"] = model.weights
  if model.prediction_heads:
    heads = heads_lib.describe_heads(model.prediction_heads)
    description["predictors"] = heads
  folders.write_json(folder / DESCRIPTION, description)


def read_description(folder: pathlib.Path) -> dict[str, Any]:
  """The folder's `mtv_jax.json`, {} if it has none.

  Raises:
    ConversionError: it has another format.
  """
  description = folders.read_json(folder / DESCRIPTION)
  if description and description.get("format") != _FORMAT:
    raise ConversionError(
      f"{folder / DESCRIPTION} has format {description.get('format')!r}, and "
      f"this version reads {_FORMAT}: convert the folder again."
    )
  return description


def restore_model(
  folder: pathlib.Path,
  description: Mapping[str, Any],
  leaves: Mapping[str, np.ndarray],
) -> ConvertedModel:
  """The model of a description and flat parameters.

  Raises:
    ConversionError: they don't match, or the tokenizer's file is missing.
  """
  spec = ModelSpec.from_dict(description["model"])
  check_params(spec, leaves)
  tokenizer = None
  if fields := description.get("tokenizer"):
    path = folder / fields["file"] if fields["file"] else None
    if path and not path.is_file():
      raise ConversionError(f"{folder / DESCRIPTION} names {path}: missing.")
    built_in = fields.get("built_in", "bytes")
    tokenizer = TokenizerFiles(path, fields["clean"], built_in)
  return ConvertedModel(
    spec=spec,
    params=unflatten_names(leaves),
    preprocess=description["preprocess"],
    tokenizer=tokenizer,
    prediction_heads=heads_lib.described_heads(
      description.get("predictors", {})
    ),
    weights=description.get("weights", "student"),
  )


def prepare_folder(
  folder: pathlib.Path,
  names: Iterable[str],
  *,
  tokenizer: TokenizerFiles | None,
) -> None:
  """Creates a folder, or removes an earlier conversion's files from it.

  Old heads or an old tokenizer would be read with the new weights.

  Args:
    folder: to write to.
    names: the files that a conversion of this form writes.
    tokenizer: to be copied, so its file must not be removed.

  Raises:
    ConversionError: the folder contains other files, or the tokenizer's source.
  """
  folder.mkdir(parents=True, exist_ok=True)
  present = sorted(p.name for p in folder.iterdir())
  if present and DESCRIPTION not in present:
    raise ConversionError(
      f"{folder} is not empty and not an earlier conversion (it contains "
      f"{', '.join(present[:5])}): name an empty or a new folder."
    )
  others = {PARAMS, folders.WEIGHTS}.difference(names).intersection(present)
  if others:
    raise ConversionError(
      f"{folder} contains another format's conversion ({', '.join(others)}), "
      "which would be read instead of the new one: name another folder."
    )
  source = tokenizer and tokenizer.path
  if source and source.resolve().parent == folder.resolve():
    raise ConversionError(
      f"The tokenizer {source} is in {folder} itself: write to another folder."
    )
  for name in names:
    (folder / name).unlink(missing_ok=True)


def copy_tokenizer(
  folder: pathlib.Path, tokenizer: TokenizerFiles | None
) -> TokenizerFiles | None:
  """Copies a tokenizer's files under Hugging Face's names."""
  if tokenizer is None or tokenizer.path is None:
    return tokenizer
  is_json = tokenizer.path.suffix == ".json"
  copied = folder / ("tokenizer.json" if is_json else "spiece.model")
  shutil.copyfile(tokenizer.path, copied)
  # A tokenizer.json doesn't always name the padding and end tokens.
  config = tokenizer.path.with_name(_TOKENIZER_CONFIG)
  if is_json and config.is_file():
    shutil.copyfile(config, folder / _TOKENIZER_CONFIG)
  return TokenizerFiles(copied, tokenizer.clean)


def numpy_leaves(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Flat float32 NumPy leaves of a parameter tree."""
  return {
    name: np.ascontiguousarray(leaf, np.float32).reshape(np.shape(leaf))
    for name, leaf in flatten_with_names(params)
  }


def check_params(spec: ModelSpec, leaves: Mapping[str, np.ndarray]) -> None:
  """Checks the towers' leaves (not the heads') against a spec.

  Raises:
    ConversionError: names every missing, unknown or mismatched leaf.
  """
  abstract = models.abstract_params(spec)
  expected = {n: tuple(a.shape) for n, a in flatten_with_names(abstract)}
  shapes = {
    name: tuple(leaf.shape)
    for name, leaf in leaves.items()
    if not name.startswith("heads/")
  }
  lines = [f"  {n}: missing" for n in expected if n not in shapes]
  for name, shape in shapes.items():
    if name not in expected:
      hint = did_you_mean(name, expected, limit=3)
      lines.append(f"  {name}: not in the model. {hint}")
    elif shape != expected[name]:
      lines.append(f"  {name}: {shape}, and the model has {expected[name]}")
  if lines:
    raise ConversionError(
      "The parameters are not those of the spec:\n" + "\n".join(lines)
    )
