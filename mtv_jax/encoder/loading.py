"""`mtv_jax.load`: opens a run, export, Hugging Face folder or baseline."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh

from mtv_jax.checkpoint.reading import find_part, load_tree
from mtv_jax.config import foreign, origin, sections
from mtv_jax.convert import (
  card,
  hf_files,
  huggingface,
  language_model,
  native,
  open_clip,
)
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError
from mtv_jax.data import ops
from mtv_jax.data.conversations import ConversationOp
from mtv_jax.data.tokenizers.source import TokenizerFiles, TokenizerSource
from mtv_jax.encoder import baselines
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess, preprocess_from_config
from mtv_jax.models import heads as heads_lib
from mtv_jax.models.heads.language_model import LanguageHead
from mtv_jax.models.lora import LoraConfig
from mtv_jax.models.two_tower import VARIANTS, ModelConfig, ModelSpec
from mtv_jax.utils import hub
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  ConfigError,
  InputError,
  MissingFileError,
  check_choice,
)
from mtv_jax.utils.text import list_first

log = logging.getLogger(__name__)
LANGUAGE_MODEL = LanguageHead.params_key
WEIGHTS = ("student", "teacher", "ema")
# Files of a hub model, without copies in other precisions. PyTorch files are
# read only if it has no safetensors.
_HUB_FILES = ("*.json", "*.model", "*.txt", "README.md", "model-*.safetensors")
_WEIGHTS = ("model", "params", "heads", "open_clip_model")
_HUB_FILES += tuple(f"{name}.safetensors" for name in _WEIGHTS)
_TORCH_FILES = ("*pytorch_model*.bin", "*.pth")
_MAX_SCALE = 100.0  # CLIP's maximum logit scale.


def load(
  path: str | os.PathLike,
  *,
  weights: str | None = None,
  step: int | None = None,
  dtype: str = "float32",
  mesh: Mesh | None = None,
) -> Encoder:
  """Opens a folder as an `Encoder`.

  Args:
    path: a local or bucket folder: a training run (`config.json` and
      `checkpoints/`), an export or native folder of `mtv-jax convert`, or a
      Hugging Face folder of a family in docs/conversion.md; a hub model
      (`ORG/NAME` or `hf:ORG/NAME`, optionally `@REVISION`, see
      `utils/hub.py`); or a baseline (`pixels:SIZE`, `random:VARIANT`, see
      `baselines.py`).
    weights: for runs: `student`, `teacher` (the teacher's image encoder with
      the student's text tower) or `ema`; by default the run's `config.weights`.
      Other folders have a single set of weights.
    step: checkpoint step of a run; the latest by default.
    dtype: compute dtype.
    mesh: by default all devices, with the batch sharded over them.

  Raises:
    MissingFileError: the path is none of these.
    InputError: the folder lacks the weights or the step.
  """
  if baselines.is_baseline(os.fspath(path)):
    check_weights(path, weights=weights, step=step)
    return baselines.load(os.fspath(path), dtype=dtype, mesh=mesh)
  model = read_model(path, weights=weights, step=step)
  with foreign.errors_of(path):
    preprocess = Preprocess.from_dict(model.preprocess)
  return Encoder(
    model.spec,
    model.params,
    preprocess,
    model.tokenizer.build() if model.tokenizer else None,
    mesh,
    dtype=dtype,
    weights=model.weights,
    source=pin_name(path),
    prediction_heads=model.prediction_heads,
  )


def read_params(
  path: str | os.PathLike,
  *,
  spec: ModelSpec | None = None,
  pixels: tuple[Sequence[float], Sequence[float]] | None = None,
  **options: Any,
) -> dict[str, Any]:
  """Reads a folder's parameters as NumPy arrays, to initialise a run.

  Resamples the position embedding to the grid of `spec`, the new model; adds a
  fixed embedding as a parameter if `spec` learns it. The caller checks shapes.
  Warns of differences from `spec` and `pixels` (mean, std) that shapes don't
  show, and, with `pixels`, of a `spec` that no export expresses. `options` are
  `weights` and `step` of `load`.
  """
  model = read_model(path, **options)
  if differences := [*_find_differences(model, spec, pixels)]:
    log.warning("%s was trained with %s.", path, "; ".join(differences))
  if spec is not None and pixels:
    huggingface.warn_of_export(spec)
  if spec is not None and spec.image.patch_size == model.spec.image.patch_size:
    if spec.image.positions == "learned":
      model = model.store_positions()
    model = model.resize(spec.image.image_size)
  return model.params


def _find_differences(
  model: ConvertedModel,
  spec: ModelSpec | None,
  pixels: tuple[Sequence[float], Sequence[float]] | None,
) -> Iterator[str]:
  """Differences between a model and a new one that shapes don't show."""
  for tower in ("image", "text"):
    source, target = getattr(model.spec, tower), getattr(spec, tower, None)
    for field in ("gelu", "norm_eps") if source and target else ():
      old, new = getattr(source, field), getattr(target, field)
      if old != new:
        yield f"{tower}.{field}={old}, but this run has {new}"
  preprocess = Preprocess.from_dict(model.preprocess)
  for field, new in zip(("mean", "std"), pixels or (), strict=False):
    if (old := getattr(preprocess, field)) != tuple(new):
      yield f"image_{field}={old}, but this run has {tuple(new)}"


def read_teacher(
  path: str | os.PathLike,
  *,
  step: int | None = None,
  spec: ModelSpec | None = None,
  image: bool = True,
) -> dict[str, Any]:
  """Reads a run's EMA teacher, `image` and `heads`, to initialise a run.

  `image`: whether to read the image encoder; see also `read_params`.
  """
  if not is_run(path):
    raise InputError(
      f"init.teacher: {path} is not a training run; it has no teacher. Set "
      "init.teacher=False to start the teacher as a copy of the student."
    )
  path = open_folder(path)
  teacher = {"heads": load_tree(path, step=step, part="teacher/heads")}
  if image:
    params = read_params(path, spec=spec, weights="teacher", step=step)
    teacher["image"] = params["image"]
  return teacher


def read_model(
  path: str | os.PathLike,
  *,
  weights: str | None = None,
  step: int | None = None,
) -> ConvertedModel:
  """Reads a folder's model as NumPy arrays; see `load`."""
  check_weights(path, weights=weights, step=step)
  if baselines.is_baseline(os.fspath(path)):
    return baselines.read_model(os.fspath(path))
  folder = open_folder(path)
  if is_run(folder):
    return read_run(folder, weights=weights, step=step)
  return huggingface.read(folder)


def check_weights(
  path: str | os.PathLike, *, weights: str | None, step: int | None
) -> None:
  """Raises InputError for `weights` or `step` of a folder that is not a run."""
  if weights is not None:
    check_choice("weights", weights, WEIGHTS)
  has_one_set = baselines.is_baseline(os.fspath(path)) or not is_run(path)
  if has_one_set and (weights not in (None, "student") or step is not None):
    raise InputError(
      f"{path} is not a training run, so it has one set of weights; got "
      f"weights={weights!r}, step={step}"
    )


def check_source(
  path: str | os.PathLike, *, weights: str | None, step: int | None
) -> None:
  """Raises if a folder lacks the weights or the step; reads no weights."""
  check_weights(path, weights=weights, step=step)
  if not baselines.is_baseline(os.fspath(path)) and is_run(path):
    parts = {"teacher": "teacher/image", "ema": "ema"}
    part = parts.get(weights or default_weights(path), "params")
    find_part(open_folder(path), step=step, part=part)


def open_folder(path: str | os.PathLike) -> pathlib.PurePath:
  """Returns the folder, or a local copy of an s3:// folder or hub model.

  Orbax can't read s3://; gs:// folders are read on demand.
  """
  if hub.is_name(path):
    return _download_model(os.fspath(path))
  folder = path_lib.as_path(path)
  is_s3 = path_lib.is_remote(path) and not str(path).startswith("gs://")
  return path_lib.local_copy(path) if is_s3 else folder


def _download_model(name: str) -> pathlib.Path:
  folder = hub.download(name, _HUB_FILES)
  # An open_clip model's other safetensors may hold only its image tower.
  is_open_clip = open_clip.is_folder(folder)
  pattern = open_clip.WEIGHTS if is_open_clip else "*.safetensors"
  if not any(folder.glob(pattern)):
    folder = hub.download(name, (*_HUB_FILES, *_TORCH_FILES))
  return folder


def pin_name(path: str | os.PathLike) -> str:
  """Pins a hub name to `ORG/NAME@COMMIT`; returns other paths unchanged."""
  text = os.fspath(path)
  if not hub.is_name(text):
    return text
  return f"{text.partition('@')[0]}@{_download_model(text).name}"


def is_run(path: str | os.PathLike) -> bool:
  """Whether a folder is a run; raises MissingFileError if unrecognised."""
  folder = open_folder(path)
  config = foreign.read_object(folder / "config.json")
  if "model" in config and "model_type" not in config:
    return True
  is_foreign = "model_type" in config or "architecture" in config
  is_native = path_lib.is_file(folder / native.PARAMS)
  if is_foreign or is_native or open_clip.is_folder(folder):
    return False
  if not path_lib.is_folder(folder):
    content = "is a file" if path_lib.exists(folder) else "does not exist"
  else:
    names = path_lib.list_folder(folder)
    content = f"has {list_first(names, 8)}" if names else "is empty"
  raise MissingFileError(
    f"{folder} {content}. Expected a training run (config.json with a "
    f"'model', and checkpoints/), a native folder ({native.PARAMS}), an export "
    "or a Hugging Face folder (config.json with a 'model_type', and "
    f"model.safetensors), or open_clip's ({open_clip.CONFIG})."
    f"{_suggest_path(folder)}"
  )


def _suggest_path(folder: pathlib.PurePath) -> str:
  """Suggests the right path for a checkpoint's folder, or the lacking file."""
  for run in () if path_lib.is_remote(folder) else folder.parents[:2]:
    has_config = path_lib.is_file(run / "config.json")
    if has_config and path_lib.is_folder(run / "checkpoints"):
      return f" Pass the run's folder, {run}; `step` selects a checkpoint."
  is_folder = path_lib.is_folder(folder)
  names = path_lib.list_folder(folder) if is_folder else [folder.name]
  if any(
    name.endswith((".pth", ".pt", ".bin", ".safetensors")) for name in names
  ):
    return (
      " For a state dict of timm or DINOv2, pass its folder, and put a "
      "config.json with timm's name beside it: "
      '{"architecture": "vit_small_patch14_dinov2"}.'
    )
  return ""


def default_weights(path: str | os.PathLike) -> str:
  """The default `weights` of a folder.

  A run's `config.weights`; "student" for older runs without that key, and for
  folders with a single set of weights.
  """
  config = foreign.read_object(open_folder(path) / "config.json")
  is_run_config = "model" in config and "model_type" not in config
  if not is_run_config:
    return "student"
  with foreign.errors_of(path_lib.as_path(path) / "config.json"):
    choices = Literal["student", "teacher", "ema"]
    return foreign.read_field(config, "weights", choices, default="student")


def read_run(
  path: str | os.PathLike,
  *,
  weights: str | None = None,
  step: int | None = None,
) -> ConvertedModel:
  """Reads a training run's model as NumPy arrays; see `load`."""
  folder = open_folder(path)
  config, model = read_run_config(folder)
  weights, params = _load_weights(folder, weights, step)
  if lora := _read_lora(folder, config):
    params = lora.merge(params)
  try:
    native.check_params(model.spec, native.numpy_leaves(params))
  except ConversionError as error:
    raise ConversionError(
      f"{folder / 'config.json'} describes a different model than the "
      f"checkpoints; config.json.old beside it may match. {error}"
    ) from None
  run_origin = origin.read_file(folder / origin.FILE)
  return dataclasses.replace(
    model, params=params, weights=weights, origin=run_origin
  )


def read_origin(path: str | os.PathLike) -> origin.Origin:
  """Returns the origin of a model or an expert's weights, with its name."""
  if baselines.is_baseline(os.fspath(path)):
    return origin.Origin(name=os.fspath(path))
  folder = open_folder(path)
  if not path_lib.is_folder(folder):
    return card.name_folder(folder)
  origins = (origin.read_file(folder / n) for n in (origin.FILE, native.INFO))
  return card.name_folder(folder, next(filter(None, origins), None))


def _load_weights(
  folder: pathlib.PurePath, weights: str | None, step: int | None
) -> tuple[str, Mapping[str, Any]]:
  """Reads a run's parameters; returns the weights' name, and the parameters."""
  weights = weights or default_weights(folder)
  log.info("%s: reading the %s weights.", folder, weights)
  part = "ema" if weights == "ema" else "params"
  params = load_tree(folder, step=step, part=part)
  if weights == "teacher":
    # Only the image encoder; text tower and temperature are the student's.
    image = load_tree(folder, step=step, part="teacher/image")
    params = {**params, "image": image}
  return weights, params


def read_adapters(
  path: str | os.PathLike,
  *,
  weights: str | None = None,
  step: int | None = None,
) -> tuple[ConvertedModel, LoraConfig, str]:
  """Reads a run's model with adapters, `config.lora` and `config.init.path`."""
  folder = open_folder(path)
  config, model = read_run_config(folder) if is_run(folder) else ({}, None)
  if model is None or not (lora := _read_lora(folder, config)):
    raise InputError(
      f"{path} is not a run with config.lora, so it has no adapters."
    )
  weights, params = _load_weights(folder, weights, step)
  model = dataclasses.replace(model, params=params, weights=weights)
  return model, lora, config["init"]["path"]


def _read_lora(
  folder: pathlib.PurePath, config: Mapping[str, Any]
) -> LoraConfig | None:
  """Reads `config.lora` from a run's config; None without adapters."""
  with foreign.errors_of(folder / "config.json"):
    if not (section := foreign.read_field(config, "lora", dict, default=None)):
      return None
    return sections.read(LoraConfig, section, "config.lora")


def read_run_config(
  folder: pathlib.PurePath,
) -> tuple[dict[str, Any], ConvertedModel]:
  """Reads a run's config, and its model without parameters."""
  config = foreign.read_object(folder / "config.json")
  with foreign.errors_of(folder / "config.json"):
    try:
      section = sections.read(ModelConfig, config["model"], "config.model")
      views = config.get("views", {})
      preprocess = preprocess_from_config(section, views).to_dict()
      length = ops.phrase_length((config.get("data") or {}).get("ops"))
      objectives = config.get("objectives", {})
      heads = heads_lib.heads_of_config(objectives, section.spec, length)
    except (LookupError, TypeError, AttributeError) as error:
      raise InputError(
        f"it is not the config that a run writes ({error!r})."
      ) from error
  tokenizer = None
  if text := section.text:
    tokenizer = TokenizerSource(text.tokenizer, text.clean).find_files(folder)
  model = ConvertedModel(
    section.spec, {}, preprocess, tokenizer, prediction_heads=heads
  )
  return config, model


@dataclasses.dataclass(frozen=True)
class ModelInfo:
  """A folder's model without parameters.

  Recipes read it before JAX initialises its devices, so it creates no arrays.

  Attributes:
    spec: architecture of the towers.
    preprocess: preprocessing of the encoder's images.
    tokenizer: tokenizer files, if any.
    contrast: options of the objective `contrastive`, {} without one: its loss
      and, for a softmax loss, the maximum scale. The maximum is a run's
      `max_scale`; for other folders 100, or the model's scale if higher.
    weights: the default weights of a run; "student" for other folders.
  """

  spec: ModelSpec
  preprocess: Preprocess
  tokenizer: TokenizerFiles | None
  contrast: Mapping[str, Any]
  weights: str

  def model_config(self) -> dict[str, Any]:
    """The section `config.model` that describes this model.

    Includes pixel statistics, preprocessing and tokenizer.
    """
    image = dataclasses.asdict(self.spec.image)
    for name, shape in VARIANTS.items():
      if all(image[key] == value for key, value in shape.items()):
        image["variant"] = f"{name}/{self.spec.image.patch_size}"
    if image["rope"] is None:
      del image["rope"]
    preprocess = self.preprocess.to_dict()
    image |= {f"image_{key}": preprocess.pop(key) for key in ("mean", "std")}
    text, files = self.spec.text, self.tokenizer
    if text is not None:
      # Training requires the user to set a missing tokenizer.
      text = dataclasses.asdict(text) | {"tokenizer": ""}
      if files is not None:
        text["tokenizer"] = str(files.path or files.built_in)
        text["clean"] = files.clean
    return {**image, "preprocess": preprocess, "text": text}


def read_model_info(path: str | os.PathLike) -> ModelInfo:
  """Reads the `ModelInfo` of a folder or a baseline, see `load`."""
  weights, contrast = "student", {}
  if baselines.is_baseline(os.fspath(path)):
    model = baselines.read_model(os.fspath(path), with_params=False)
  elif is_run(folder := open_folder(path)):
    config, model = read_run_config(folder)
    contrast = _read_run_contrast(config)
    weights = default_weights(folder)
  else:
    model = huggingface.read(folder, with_params=False)
    contrast = _read_export_contrast(folder, model.spec)
  with foreign.errors_of(path):
    preprocess = Preprocess.from_dict(model.preprocess)
  return ModelInfo(model.spec, preprocess, model.tokenizer, contrast, weights)


def _read_run_contrast(config: Mapping[str, Any]) -> dict[str, Any]:
  for name, entry in (config.get("objectives") or {}).items():
    if entry.get("type", name) == "contrastive":
      options = {"loss_type": entry.get("loss_type", "sigmoid")}
      options["max_scale"] = entry.get("max_scale")
      return {k: v for k, v in options.items() if v is not None}
  return {}


def _read_export_contrast(
  folder: pathlib.PurePath, spec: ModelSpec
) -> dict[str, Any]:
  if spec.text is None or not (pair := huggingface.read_contrastive(folder)):
    return {}
  loss_type, scale = pair
  options = {"max_scale": max(_MAX_SCALE, scale)}
  return {"loss_type": loss_type, **(options if loss_type == "softmax" else {})}


def read_conversation_op(path: str | os.PathLike) -> ConversationOp:
  """The op `conversation` of a run, with the run's copy of the tokenizer.

  Raises InputError for a folder that is not a run of `next_token`.
  """
  folder = open_folder(path)
  config = foreign.read_object(folder / "config.json")
  op = None
  if "objectives" in config:
    with foreign.errors_of(folder / "config.json"):
      data = foreign.read_field(config, "data", dict, default={})
      text = foreign.read_field(data, "ops", str, default="")
    op = ops.find_op(text)
  if op is None:
    raise InputError(
      f"{folder} is not a run with the op `conversation` in data.ops, so it"
      " lacks a language model or tokenizer; pass a run of configs/llava.py."
    )
  copy = (
    folder / ops.CONVERSATION_TOKENIZER / pathlib.PurePath(op.tokenizer).name
  )
  if path_lib.is_file(copy):
    op = dataclasses.replace(op, tokenizer=str(copy))
  return op


def has_language_model(path: str | os.PathLike) -> bool:
  """Whether a path is a run with a language model, see `load`."""
  if baselines.is_baseline(os.fspath(path)) or not is_run(path):
    return False
  _, model = read_run_config(open_folder(path))
  return LANGUAGE_MODEL in model.prediction_heads


class LanguageModelSource(NamedTuple):
  """A language model to start from: options, parameters and tokenizer."""

  options: dict[str, Any]  # Fields of `LanguageModelSpec`.
  params: dict[str, Any]  # {} if they are not read.
  tokenizer: str  # For the op `conversation`; "" if the folder has none.
  head: LanguageHead | None = None  # None unless read from a run.


def read_language_model(
  path: str | os.PathLike, *, with_params: bool = True
) -> LanguageModelSource:
  """Reads a run of `next_token`, or a folder or hub model of transformers.

  A run's parameters are its default weights, with adapters merged.
  """
  folder = open_folder(path)
  config = foreign.read_object(folder / "config.json")
  if "objectives" not in config:
    spec, params = language_model.read(folder, with_params=with_params)
    tokenizer = hf_files.require_folder(folder) / "tokenizer.json"
    name = str(tokenizer) if tokenizer.is_file() else ""
    return LanguageModelSource(dataclasses.asdict(spec), params, name)
  _, model = read_run_config(folder)
  if (head := model.prediction_heads.get(LANGUAGE_MODEL)) is None:
    raise ConfigError(f"{path} is a run without the objective next_token.")
  params = {}
  if with_params:
    params = read_params(folder)["heads"][LANGUAGE_MODEL]["decoder"]
  options = dataclasses.asdict(head.language_spec)
  tokenizer = read_conversation_op(path).tokenizer
  return LanguageModelSource(options, params, tokenizer, head)
