"""Native folders: `params.safetensors`, `mtv_jax.json`, tokenizer files.

They store any model under our names, even if no `transformers` class supports
it. Hugging Face exports also have a `mtv_jax.json`, from which
`huggingface.read` restores the model.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from mtv_jax.config import foreign, options, sections
from mtv_jax.config import origin as origin_lib
from mtv_jax.convert import hf_files, tensors
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError
from mtv_jax.data.tokenizers.source import Cleaning, TokenizerFiles
from mtv_jax.models import heads as heads_lib
from mtv_jax.models import two_tower as models
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import did_you_mean
from mtv_jax.utils.text import first_lines, list_first
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

PARAMS = "params.safetensors"
INFO = "mtv_jax.json"
_FORMAT = 1
_TOKENIZER_CONFIG = "tokenizer_config.json"
_Weights = Literal["student", "teacher", "ema"]
ONNX = ("model.onnx", "model.onnx.data")  # In exports.
STABLEHLO = ".stablehlo"  # Suffix of functions in native folders.
_WRITTEN_FILES = (PARAMS, "tokenizer.json", "spiece.model", _TOKENIZER_CONFIG)
# Adds files to a written folder before it is renamed into place.
AddFiles = Callable[[pathlib.Path], None]


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
  file: str | None
  clean: Cleaning
  built_in: Literal["bytes", "words", "question_words"] = "bytes"


@dataclasses.dataclass(frozen=True)
class ContrastiveInfo:
  """Name and leaves of the head that holds an export's temperature."""

  name: str
  leaves: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ExportInfo:
  """Contents of a `mtv_jax.json`."""

  model: ModelSpec
  preprocess: Mapping[str, Any]
  tokenizer: _Tokenizer | None
  contrastive: ContrastiveInfo | None
  prediction_heads: Mapping[str, heads_lib.PredictionHead]
  weights: _Weights
  origin: origin_lib.Origin | None


def write(
  folder: str | os.PathLike,
  model: ConvertedModel,
  *,
  add_files: AddFiles = lambda _: None,
) -> pathlib.PurePath:
  """Writes any model as a native folder, for `read` and for `config.init`.

  The folder is new, empty, or an earlier conversion, which is replaced.
  """
  leaves = numpy_leaves(model.params)
  check_params(model.spec, leaves)
  with replace_conversion(path_lib.as_path(folder), _WRITTEN_FILES) as path:
    hf_files.write_tensors(path / PARAMS, leaves)
    tokenizer = copy_tokenizer(path, model.tokenizer)
    write_info(path, dataclasses.replace(model, tokenizer=tokenizer))
    add_files(path)
  return path_lib.as_path(folder)


def read(folder: pathlib.Path, info: ExportInfo | None) -> ConvertedModel:
  """Reads a native folder, given its `mtv_jax.json`."""
  if info is None:
    raise ConversionError(
      f"{folder} lacks {INFO}, which a conversion writes last: it did not "
      "finish. Convert again."
    )
  with hf_files.TensorFiles(folder / PARAMS) as store:
    leaves = {name: tensors.read_float(store, name) for name in store.names}
  return restore_model(folder, info, leaves)


def read_contrastive(folder: pathlib.Path) -> tuple[float, float] | None:
  """Reads a native folder's log scale and bias (0 if absent).

  Returns None for a folder without a temperature.
  """
  with hf_files.TensorFiles(folder / PARAMS) as store:
    heads: dict[str, dict[str, str]] = {}
    for name in store.names:
      if name.startswith("heads/") and name.count("/") == 2:
        _, head, leaf = name.split("/")
        heads.setdefault(head, {})[leaf] = name
    try:
      names = heads[heads_lib.contrastive_head(heads)]
    except ValueError:
      return None
    scale = float(tensors.read_float(store, names["logit_scale"]))
    if "logit_bias" not in names:
      return scale, 0.0
    return scale, float(tensors.read_float(store, names["logit_bias"]))


def write_info(
  folder: pathlib.Path, model: ConvertedModel, **fields: Any
) -> None:
  """Writes `mtv_jax.json`; the tokenizer's file must be in the folder."""
  info = {
    "format": _FORMAT,
    "model": model.spec.to_dict(),
    "preprocess": model.preprocess,
    **fields,
  }
  if model.tokenizer is not None:
    path = model.tokenizer.path
    clean = model.tokenizer.clean
    info["tokenizer"] = {"file": path and path.name, "clean": clean}
    if path is None and model.tokenizer.built_in != "bytes":
      info["tokenizer"]["built_in"] = model.tokenizer.built_in
  if model.weights != "student":
    info["weights"] = model.weights
  if model.origin is not None:
    info["origin"] = sections.to_dict(model.origin)
  if descriptions := heads_lib.describe_heads(model.prediction_heads):
    info["predictors"] = descriptions
  hf_files.write_json(folder / INFO, info)


def read_info(folder: pathlib.Path) -> ExportInfo | None:
  """Reads the folder's `mtv_jax.json`; None if absent."""
  path = folder / INFO
  content = foreign.read_object(path)
  if not content and not path.is_file():
    return None
  if content.get("format") != _FORMAT:
    raise ConversionError(
      f"{path} has format {options.shorten_repr(content.get('format'))}, but "
      f"this version reads {_FORMAT}: convert the folder again."
    )
  read_field = functools.partial(foreign.read_field, content)

  def build(key: str, kind: type) -> Any:
    fields = read_field(key, dict, default=None)
    return fields and options.build(kind, fields, where=key)

  with foreign.errors_of(path):
    return ExportInfo(
      model=ModelSpec.from_dict(read_field("model", dict)),
      preprocess=read_field("preprocess", dict),
      tokenizer=build("tokenizer", _Tokenizer),
      contrastive=build("contrastive", ContrastiveInfo),
      prediction_heads=heads_lib.described_heads(
        read_field("predictors", dict[str, dict], default={})
      ),
      weights=read_field("weights", _Weights, default="student"),
      origin=origin_lib.read(content["origin"])
      if "origin" in content
      else None,
    )


def restore_model(
  folder: pathlib.Path,
  info: ExportInfo,
  leaves: Mapping[str, np.ndarray] | None,
) -> ConvertedModel:
  """Builds a model from its `mtv_jax.json` and optional flat parameters."""
  if leaves is not None:
    check_params(info.model, leaves)
  tokenizer, fields = None, info.tokenizer
  if fields:
    path, where = None, folder / INFO
    if fields.file:
      path = foreign.resolve_name(folder, fields.file, where=where)
      if not path.is_file():
        raise ConversionError(f"{where} names {path}, which is missing.")
    tokenizer = TokenizerFiles(path, fields.clean, fields.built_in)
  return ConvertedModel(
    spec=info.model,
    params=unflatten_names(leaves or {}),
    preprocess=info.preprocess,
    tokenizer=tokenizer,
    prediction_heads=info.prediction_heads,
    weights=info.weights,
    origin=info.origin,
  )


@contextlib.contextmanager
def replace_conversion(
  folder: pathlib.PurePath, names: Collection[str]
) -> Iterator[pathlib.Path]:
  """Yields a temporary folder for a conversion, which then becomes `folder`.

  `folder` must be new, empty, or an earlier conversion. All old files in
  `names` are removed, so that old heads or tokenizers are never read with the
  new weights; other files stay. If killed, `folder` is unchanged; in a bucket,
  it is then not readable as a model.
  """
  if path_lib.exists(folder) and not path_lib.is_folder(folder):
    raise ConversionError(f"{folder} is a file: name an empty or a new folder.")
  files = path_lib.list_folder(folder)
  if files and INFO not in files:
    raise ConversionError(
      f"{folder} is not empty and not an earlier conversion (it contains "
      f"{list_first(files, 5)}): name an empty or a new folder."
    )
  weights = {PARAMS, hf_files.WEIGHTS}.difference(names).intersection(files)
  if weights:
    raise ConversionError(
      f"{folder} contains another format's conversion ({', '.join(weights)}), "
      "which would be read instead of the new one: name another folder."
    )
  names = {*names, *(name for name in files if name.endswith(STABLEHLO))}
  if not path_lib.is_remote(folder):
    with atomic.replace_folder(folder, replaced={*names, INFO}) as path:
      yield path
    return
  with tempfile.TemporaryDirectory() as temporary:
    path = pathlib.Path(temporary)
    yield path
    # The folder is readable as a model only with these files.
    path_lib.upload_folder(path, folder, last=["config.json", PARAMS, INFO])
    for name in names.intersection(files):
      if not (path / name).exists():
        path_lib.remove(folder / name)


def copy_tokenizer(
  folder: pathlib.Path, tokenizer: TokenizerFiles | None
) -> TokenizerFiles | None:
  """Copies a tokenizer's files to a folder, under Hugging Face's file names."""
  if tokenizer is None or tokenizer.path is None:
    return tokenizer
  is_json = tokenizer.path.suffix == ".json"
  copy = folder / ("tokenizer.json" if is_json else "spiece.model")
  shutil.copyfile(tokenizer.path, copy)
  # tokenizer.json may lack the padding and end tokens.
  config = tokenizer.path.with_name(_TOKENIZER_CONFIG)
  if is_json and config.is_file():
    shutil.copyfile(config, folder / _TOKENIZER_CONFIG)
  return TokenizerFiles(copy, tokenizer.clean)


def numpy_leaves(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Flattens a parameter tree to contiguous float32 arrays by name."""
  return {
    name: np.ascontiguousarray(leaf, np.float32).reshape(np.shape(leaf))
    for name, leaf in flatten_with_names(params)
  }


def check_params(spec: ModelSpec, leaves: Mapping[str, np.ndarray]) -> None:
  """Checks names and shapes of the towers' leaves against a spec."""
  abstract = models.abstract_params(spec)
  expected = {n: tuple(a.shape) for n, a in flatten_with_names(abstract)}
  shapes = {
    name: tuple(leaf.shape)
    for name, leaf in leaves.items()
    if not name.startswith("heads/")
  }
  lines = [f"{n}: missing" for n in expected if n not in shapes]
  for name, shape in shapes.items():
    if name not in expected:
      hint = did_you_mean(name, expected, limit=3)
      lines.append(f"{name}: not in the model. {hint}")
    elif shape != expected[name]:
      lines.append(f"{name}: {shape}, but the model has {expected[name]}")
  if lines:
    raise ConversionError(
      f"The parameters don't match the spec:\n{first_lines(lines, 20)}"
    )
