"""Native export: `params.safetensors`, `mtv_jax.json`, tokenizer files.

It holds what no `transformers` class could (a CLIP whose class token has its
position folded in, a DINOv2 tapped at any layer), under our own names. The
same JSON lies in an export too, so that an export comes back as it was.
"""

import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import folders
from mtv_jax.convert.converted import Converted
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
TOKENIZER_CONFIG = "tokenizer_config.json"
_WRITTEN = (PARAMS, "tokenizer.json", "spiece.model", TOKENIZER_CONFIG)


def describe(
  spec: ModelSpec,
  preprocess: Mapping[str, Any],
  tokenizer: TokenizerFiles | None,
  *,
  prediction_heads: Mapping[str, heads_lib.PredictionHead] | None = None,
  **more: Any,
) -> dict[str, Any]:
  """What `mtv_jax.json` says; the tokenizer is the folder's own."""
  fields = {
    k: list(v) if isinstance(v, tuple) else v for k, v in preprocess.items()
  }
  described = {"format": _FORMAT, "model": spec.to_dict(), "preprocess": fields}
  if tokenizer is not None:
    file = None if tokenizer.path is None else tokenizer.path.name
    described["tokenizer"] = {"file": file, "clean": tokenizer.clean}
  if prediction_heads:
    described["predictors"] = heads_lib.describe_heads(prediction_heads)
  return {**described, **more}


def description(folder: pathlib.Path) -> dict[str, Any]:
  """The folder's `mtv_jax.json`, {} if it has none.

  Raises:
    ConversionError: another version wrote it.
  """
  found = folders.read_json(folder / DESCRIPTION)
  if found and found.get("format") != _FORMAT:
    raise ConversionError(
      f"{folder / DESCRIPTION} has format {found.get('format')!r}, and this "
      f"version reads {_FORMAT}: convert the folder again."
    )
  return found


def described_tokenizer(
  folder: pathlib.Path, found: Mapping[str, Any]
) -> TokenizerFiles | None:
  """The tokenizer that a description names."""
  tokenizer = found.get("tokenizer")
  if tokenizer is None:
    return None
  path = tokenizer["file"] and folder / tokenizer["file"]
  if path and not path.is_file():
    raise ConversionError(f"{folder / DESCRIPTION} names {path}: missing.")
  return TokenizerFiles(path or None, tokenizer["clean"])


def described_heads(
  found: Mapping[str, Any],
) -> dict[str, heads_lib.PredictionHead]:
  """The heads that predict, by name, as far as a description says."""
  return heads_lib.described_heads(found.get("predictors", {}))


def prepare(
  folder: pathlib.Path,
  ours: Iterable[str],
  *,
  tokenizer: TokenizerFiles | None = None,
) -> None:
  """Makes a folder ready to be written.

  What an earlier conversion left goes, lest old heads or an old tokenizer be
  read with new weights.

  Args:
    folder: to write to.
    ours: names of the files that a conversion may have left.
    tokenizer: what will be written, and must not be cleared away.

  Raises:
    ConversionError: the folder holds something else, or the source.
  """
  folder.mkdir(parents=True, exist_ok=True)
  present = sorted(p.name for p in folder.iterdir())
  if present and DESCRIPTION not in present:
    raise ConversionError(
      f"{folder} is not empty and no earlier conversion (it holds "
      f"{', '.join(present[:5])}): name an empty or a new folder."
    )
  others = {PARAMS, folders.WEIGHTS} - set(ours)
  if lost := sorted(others.intersection(present)):
    raise ConversionError(
      f"{folder} holds a conversion of another form ({', '.join(lost)}), which"
      " would be read in place of the new one: name another folder."
    )
  source = tokenizer.path if tokenizer is not None else None
  if source is not None and source.resolve().parent == folder.resolve():
    raise ConversionError(
      f"The tokenizer to be written, {source}, lies in {folder} itself: write "
      "to another folder."
    )
  for name in ours:
    (folder / name).unlink(missing_ok=True)


def write(
  folder: pathlib.Path,
  spec: ModelSpec,
  params: Mapping[str, Any],
  *,
  preprocess: Mapping[str, Any],
  tokenizer: TokenizerFiles | None = None,
  prediction_heads: Mapping[str, heads_lib.PredictionHead] | None = None,
) -> None:
  """Writes a model in our own form.

  Args:
    folder: new, empty or of an earlier conversion.
    spec: the model.
    params: `image`, and maybe `text` and `heads`.
    preprocess: fields of `Preprocess`.
    tokenizer: its file is copied into the folder.
    prediction_heads: configuration of the heads that predict, by name.
  """
  leaves = numpy_leaves(params)
  check_params(spec, leaves)
  prepare(folder, _WRITTEN, tokenizer=tokenizer)
  folders.write_tensors(folder / PARAMS, leaves)
  copied = copy_tokenizer(folder, tokenizer)
  described = describe(
    spec, preprocess, copied, prediction_heads=prediction_heads
  )
  folders.write_json(folder / DESCRIPTION, described)


def copy_tokenizer(
  folder: pathlib.Path, tokenizer: TokenizerFiles | None
) -> TokenizerFiles | None:
  """Copies a tokenizer's files under Hugging Face's names."""
  if tokenizer is None or tokenizer.path is None:
    return tokenizer
  fast = tokenizer.path.suffix == ".json"
  copied = folder / ("tokenizer.json" if fast else "spiece.model")
  shutil.copyfile(tokenizer.path, copied)
  # A tokenizer.json doesn't always say what pads and ends a text.
  beside = tokenizer.path.with_name(TOKENIZER_CONFIG)
  if fast and beside.is_file():
    shutil.copyfile(beside, folder / TOKENIZER_CONFIG)
  return TokenizerFiles(copied, tokenizer.clean)


def read(folder: pathlib.Path) -> Converted:
  """Reads what `write` wrote."""
  found = description(folder)
  with folders.TensorFiles([folder / PARAMS]) as store:
    leaves = {name: store.read(name) for name in store.names}
  spec = ModelSpec.from_dict(found["model"])
  check_params(spec, leaves)
  return Converted(
    spec=spec,
    params=unflatten_names(leaves),
    preprocess=found["preprocess"],
    tokenizer=described_tokenizer(folder, found),
    prediction_heads=described_heads(found),
  )


def numpy_leaves(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Flat float32 NumPy leaves of a tree of parameters."""
  return {
    name: np.ascontiguousarray(np.asarray(leaf, np.float32)).reshape(
      np.shape(leaf)
    )
    for name, leaf in flatten_with_names(params)
  }


def check_params(spec: ModelSpec, leaves: Mapping[str, np.ndarray]) -> None:
  """Checks the towers' leaves (not the heads') against a spec.

  Raises:
    ConversionError: names every leaf that is missing, too many or misshapen.
  """
  want = {
    name: tuple(leaf.shape)
    for name, leaf in flatten_with_names(models.abstract_params(spec))
  }
  got = {
    name: tuple(leaf.shape)
    for name, leaf in leaves.items()
    if not name.startswith("heads/")
  }
  lines = [f"  {n}: missing" for n in want if n not in got]
  lines += [
    f"  {n}: not in the model. {did_you_mean(n, want, limit=3)}"
    for n in got
    if n not in want
  ]
  lines += [
    f"  {n}: {got[n]}, and the model has {want[n]}"
    for n in want
    if n in got and got[n] != want[n]
  ]
  if lines:
    raise ConversionError(
      "The parameters are not those of the spec:\n" + "\n".join(lines)
    )
