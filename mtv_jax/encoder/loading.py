"""`mtv_jax.load`: a run, an export, a Hugging Face folder or a baseline."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mtv_jax.checkpoint.checkpointer import load_tree
from mtv_jax.convert import converted, huggingface, native, processors
from mtv_jax.convert.tables import ConversionError
from mtv_jax.encoder import baselines
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess, preprocess_of
from mtv_jax.models import heads as heads_lib
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.errors import did_you_mean

WEIGHTS = ("student", "teacher", "ema")


def load(
  path: str | os.PathLike,
  *,
  weights: str = "student",
  step: int | None = None,
  dtype: str = "float32",
  mesh: Mesh | None = None,
) -> Encoder:
  """Opens a folder as an `Encoder`.

  Args:
    path: a training run (`config.json` and `checkpoints/`), an export or
      native folder of `tools/convert.py`, or a Hugging Face folder (SigLIP,
      SigLIP 2 of fixed resolution, CLIP, DINOv2). Or a baseline, see
      `baselines.py`: `pixels:SIZE`, `random:VARIANT`.
    weights: of a run: `student`, `teacher` (its image encoder, with the
      student's text tower) or `ema`. Other folders hold one set of weights.
    step: of a run, which checkpoint; the latest by default.
    dtype: of the computation.
    mesh: to compute on; by default all devices, the batch split over them.

  Raises:
    FileNotFoundError: if nothing that can be opened is there.
    ValueError: for weights or a step that the folder does not have.
  """
  if baselines.is_baseline(os.fspath(path)):
    _require_one_set(path, weights, step)
    return baselines.load(os.fspath(path), dtype=dtype, mesh=mesh)
  model = read_model(path, weights=weights, step=step)
  return Encoder(
    model.spec,
    model.params,
    Preprocess.from_dict(model.preprocess),
    model.tokenizer.build() if model.tokenizer else None,
    mesh,
    dtype=dtype,
    weights=weights,
    source=str(path),
    prediction_heads=model.prediction_heads,
  )


def read_params(
  path: str | os.PathLike,
  *,
  weights: str = "student",
  step: int | None = None,
  spec: ModelSpec | None = None,
) -> dict[str, Any]:
  """Only the parameters of a folder, as NumPy arrays, to start a run from.

  Args:
    path: as for `load`.
    weights: as for `load`.
    step: as for `load`.
    spec: of the model they are for: the position embedding is resampled to the
      grid of its images. What else differs is the caller's to find.
  """
  model = read_model(path, weights=weights, step=step)
  if spec is not None and spec.image.patch_size == model.spec.image.patch_size:
    model = model.resized(spec.image.image_size)
  return model.params


def read_model(
  path: str | os.PathLike, *, weights: str = "student", step: int | None = None
) -> converted.Converted:
  """What `load` makes an encoder of, as NumPy arrays; see there."""
  if weights not in WEIGHTS:
    raise ValueError(
      f"weights={weights!r}. {did_you_mean(str(weights), WEIGHTS)}"
    )
  folder = pathlib.Path(path)
  if is_run(folder):
    return read_run(folder, weights=weights, step=step)
  _require_one_set(folder, weights, step)
  return huggingface.read(folder)


def is_run(path: str | os.PathLike) -> bool:
  """Whether a folder is a training run's.

  Raises:
    FileNotFoundError: if it is nothing that can be opened; says what is there.
  """
  folder = pathlib.Path(path)
  config = folder / "config.json"
  found = _json(config) if config.is_file() else {}
  if "model" in found and "model_type" not in found:
    return True
  if "model_type" in found or (folder / native.PARAMS).is_file():
    return False
  if not folder.is_dir():
    there = "a file" if folder.exists() else "nothing there"
  else:
    names = sorted(p.name for p in folder.iterdir())
    there = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    there = there or "an empty folder"
  raise FileNotFoundError(
    f"{folder}: found {there}. Recognised are a training run (config.json "
    "with a 'model', and checkpoints/), a folder of ours "
    f"({native.PARAMS}) and an export or a Hugging Face folder (config.json "
    f"with a 'model_type', and model.safetensors).{_likely(folder)}"
  )


def _likely(folder: pathlib.Path) -> str:
  """What may have been meant by a folder that can't be opened."""
  for run in folder.parents[:2]:
    if (run / "checkpoints").is_dir() and (run / "config.json").is_file():
      return f" Give the run's own folder, {run}; `step` chooses a checkpoint."
  if len(folder.parts) == 2 and not folder.parent.exists():
    return (
      " Nothing is downloaded here: for a model of the hub, run "
      f"`hf download {folder} --local-dir FOLDER` and give FOLDER."
    )
  return ""


def read_run(
  path: str | os.PathLike, *, weights: str = "student", step: int | None = None
) -> converted.Converted:
  """A training run's model as NumPy arrays.

  Args:
    path: the run's folder.
    weights: `student`, `teacher` or `ema`.
    step: which checkpoint; the latest by default.
  """
  folder = pathlib.Path(path)
  config = ConfigDict(_json(folder / "config.json"))
  spec = ModelSpec.from_config(config.model)
  params = _weights(folder, weights, step)
  try:
    native.check_params(spec, native.numpy_leaves(params))
  except ConversionError as error:
    raise ConversionError(
      f"{folder / 'config.json'} describes another model than the run's"
      " checkpoints hold; config.json.old beside it may be theirs."
      f" {error}"
    ) from None
  return converted.Converted(
    spec=spec,
    params=params,
    preprocess=preprocess_of(config).to_dict(),
    tokenizer=_tokenizer(folder, config),
    prediction_heads=heads_lib.heads_of_config(
      config.get("objectives", {}), spec
    ),
  )


def _weights(
  folder: pathlib.Path, weights: str, step: int | None
) -> dict[str, Any]:
  def read(part: str) -> dict[str, Any]:
    return load_tree(folder, step=step, part=part)

  if weights == "ema":
    return read("ema")
  params = read("params")
  if weights == "teacher":
    # A teacher is an image encoder; the text tower and the temperature that go
    # with it are the student's.
    params = {**params, "image": read("teacher/image")}
  return params


def _tokenizer(
  folder: pathlib.Path, config: ConfigDict
) -> processors.TokenizerFiles | None:
  """The run's own copy, or where the config says that it was."""
  text = config.model.get("text")
  if not text:
    return None
  spec, clean = text.get("tokenizer", "bytes"), text.get("clean", "lower")
  if spec == "bytes":
    return processors.TokenizerFiles(None, clean)
  own = folder / "tokenizer" / pathlib.PurePath(spec).name
  for file in (own, pathlib.Path(spec)):
    if file.is_file():
      return processors.TokenizerFiles(file, clean)
  raise FileNotFoundError(
    f"the tokenizer of this run is at neither {own} nor {spec}: copy the file "
    "that it was trained with to the first"
  )


def _require_one_set(
  folder: str | os.PathLike, weights: str, step: int | None
) -> None:
  if weights == "student" and step is None:
    return
  raise ValueError(
    f"{folder} is not a training run, and holds one set of weights; got "
    f"weights={weights!r}, step={step}. Which weights an export has was chosen "
    "when it was written"
  )


def _json(path: pathlib.Path) -> Mapping[str, Any]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  if not isinstance(content, dict):
    raise ValueError(f"{path} is not a JSON object")
  return content
