"""Reader of big_vision SigLIP checkpoints (NumPy archives).

A two-tower model has `img` (a ViT), `txt` (a transformer with a dense `head`),
`t` (log inverse temperature) and `b`. Scanned blocks are stacked in one
`encoderblock`; unscanned blocks are `encoderblock_0`, ...
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator

import jax.numpy as jnp
import numpy as np

from mtv_jax.config import foreign, options
from mtv_jax.convert import tables, tensors
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models.layers import NumLayers
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.utils.errors import MissingFileError, did_you_mean

log = logging.getLogger(__name__)

_ATTENTION = "MultiHeadDotProductAttention_0"
_QKV = tuple(f"{_ATTENTION}/{part}" for part in ("query", "key", "value"))
_BLOCKS = {
  "norm1": "LayerNorm_0",
  "attention/qkv": _QKV,
  "attention/out": f"{_ATTENTION}/out",
  "norm2": "LayerNorm_1",
  "mlp/fc1": "MlpBlock_0/Dense_0",
  "mlp/fc2": "MlpBlock_0/Dense_1",
}
_POOL = {
  "probe": "probe",
  "attention/q": _QKV[0],
  "attention/kv": _QKV[1:],
  "attention/out": f"{_ATTENTION}/out",
  "norm": "LayerNorm_0",
  "mlp/fc1": "MlpBlock_0/Dense_0",
  "mlp/fc2": "MlpBlock_0/Dense_1",
}
_NAMES = {
  "image/patch_embed": "img/embedding",
  "image/position_embedding": "img/pos_embedding",
  "image/cls_token": "img/cls",
  **tables.nest("image/blocks/", "img/Transformer/encoderblock_{i}/", _BLOCKS),
  "image/norm": "img/Transformer/encoder_norm",
  **tables.nest("image/pool/", "img/MAPHead_0/", _POOL),
  "text/token_embedding": "txt/Embed_0/embedding",
  "text/position_embedding": "txt/pos_embedding",
  **tables.nest("text/blocks/", "txt/Encoder_0/encoderblock_{i}/", _BLOCKS),
  "text/norm": "txt/Encoder_0/encoder_norm",
  "text/projection": "txt/head",
}
_NUM_UNIT_AXES = {
  "image/position_embedding": 1,
  "image/cls_token": 2,
  "image/pool/probe": 2,
  "text/position_embedding": 1,
}
# SigLIP squashes images to a square with tf.image.resize (bilinear, not
# antialiased) and scales them to -1..1.
_PREPROCESS = {
  "resize": "squash",
  "crop": "none",
  "interpolation": "bilinear",
  "antialias": False,
  "mean": (0.5, 0.5, 0.5),
  "std": (0.5, 0.5, 0.5),
}


class _Archive:
  """An archive's parameters, with stacked blocks split into numbered names.

  Reads names and shapes from the headers, so that arrays of another model, or
  too large for memory, are never loaded.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._shapes: dict[str, tuple[int, ...]] = {}
    # By name: the array in the file, and the layer index if stacked.
    self._members: dict[str, tuple[str, int | None]] = {}
    # All layers are slices of a few stacked arrays.
    self._load = functools.lru_cache(maxsize=4)(self._read_member)
    for name, (member, shape) in _read_headers(path).items():
      if "/encoderblock/" not in name:
        self._members[name], self._shapes[name] = (member, None), shape
        continue
      depth = shape[0] if shape else 0
      options.check_value(depth, NumLayers, f"{path}: the layers of {name!r}")
      for i in range(depth):
        block = name.replace("/encoderblock/", f"/encoderblock_{i}/")
        self._members[block], self._shapes[block] = (member, i), shape[1:]

  @property
  def names(self) -> list[str]:
    return list(self._shapes)

  def shape(self, name: str, axes: int | None = None) -> tuple[int, ...]:
    """Returns an array's shape; ConversionError if its rank isn't `axes`."""
    if name not in self._shapes:
      raise ConversionError(
        f"The archive lacks {name!r}, so it is not a big_vision SigLIP. "
        f"{did_you_mean(name, self._shapes, limit=8)}"
      )
    shape = self._shapes[name]
    if axes is not None and len(shape) != axes:
      raise ConversionError(f"{name} is {shape}, expected {axes} axes.")
    return shape

  def read(self, name: str) -> np.ndarray:
    member, layer = self._members[name]
    array = self._load(member)
    array = array if layer is None else array[layer]
    # NumPy stores bfloat16 as void bytes (V2).
    return array.view(jnp.bfloat16) if array.dtype == "V2" else array

  def _read_member(self, member: str) -> np.ndarray:
    with _convert_archive_errors(self.path), np.load(self.path) as archive:
      return archive[member]


def read(path: str | os.PathLike) -> ConvertedModel:
  """Reads a SigLIP (or SigLIP 2, fixed resolution) checkpoint.

  The `.npz` lacks a tokenizer; optimizer state is ignored. Errors name missing,
  unexpected and mismatched arrays.
  """
  store = _Archive(pathlib.Path(path))
  with foreign.errors_of(path):
    spec = _read_spec(store)
  return ConvertedModel(
    spec=spec,
    params=tensors.load(_param_mapping(spec, store.names), store),
    preprocess={"size": spec.image.image_size, **_PREPROCESS},
  )


@contextlib.contextmanager
def _convert_archive_errors(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (
    ValueError, EOFError, OSError, MemoryError, NotImplementedError,
    zipfile.BadZipFile, zlib.error,
  ) as error:  # fmt: skip
    raise ConversionError(f"{path} is not an .npz archive: {error}") from None


def _read_headers(
  path: pathlib.Path,
) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Reads each parameter's archive name and shape, without optimizer state."""
  if not path.is_file():
    raise MissingFileError(f"There is no file {path}; expected an .npz.")
  # NumPy would treat any other file as a pickle and suggest loading it.
  if not zipfile.is_zipfile(path):
    with path.open("rb") as file:
      start = file.read(16)
    raise ConversionError(
      f"{path} is not an .npz archive, or is truncated: it starts with"
      f" {start!r}. Expected a checkpoint of big_vision; from_hf converts"
      " Hugging Face folders."
    )
  shapes = {}
  with _convert_archive_errors(path), zipfile.ZipFile(path) as archive:
    for member in archive.namelist():
      with archive.open(member) as stream:
        shapes[member.removesuffix(".npy")] = _read_shape(stream)
  for prefix in ("params/", "opt/target/", ""):
    if names := [name for name in shapes if name.startswith(prefix)]:
      break
  return {name.removeprefix(prefix): (name, shapes[name]) for name in names}


def _read_shape(stream: io.BufferedIOBase) -> tuple[int, ...]:
  """Reads the shape in an array's header."""
  version = np.lib.format.read_magic(stream)
  read_header = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }.get(version)
  if read_header is None:
    raise ValueError(f"NumPy's format {version} is not supported")
  shape, _, dtype = read_header(stream)
  if dtype.hasobject:
    raise ValueError("it has a pickled array, but pickles are not read")
  return shape


def _read_trunk(store: _Archive, prefix: str) -> dict[str, int]:
  """Reads an encoder's width, depth, heads and mlp_dim from its shapes."""
  pattern = re.compile(rf"{prefix}/encoderblock_(\d+)/")
  matches = filter(None, map(pattern.match, store.names))
  blocks = {int(match[1]) for match in matches}
  first_block = f"{prefix}/encoderblock_0"
  query, hidden = _BLOCKS["attention/qkv"][0], _BLOCKS["mlp/fc1"]
  width, heads, _ = store.shape(f"{first_block}/{query}/kernel", 3)
  _, mlp_dim = store.shape(f"{first_block}/{hidden}/kernel", 2)
  return {
    "width": width,
    "depth": max(blocks) + 1,
    "heads": heads,
    "mlp_dim": mlp_dim,
  }


def _read_spec(store: _Archive) -> ModelSpec:
  """Infers the model from the arrays' shapes."""
  names = set(store.names)
  kernel = store.shape("img/embedding/kernel")
  if len(kernel) != 4:
    raise ConversionError(
      f"img/embedding/kernel is {kernel}, not a convolution's: NaFlex "
      "checkpoints (variable aspect ratio) are not supported. SigLIP 2 "
      "checkpoints of fixed resolution are."
    )
  if "img/head/kernel" in names:
    raise ConversionError(
      "img/head projects the image with a bias, which our image towers lack;"
      " SigLIP has no such head."
    )
  pool = "map" if "img/MAPHead_0/probe" in names else "mean"
  if "img/cls" in names:
    pool = "cls"
  grid = math.isqrt(store.shape("img/pos_embedding", 3)[1])
  image = ViTSpec(
    image_size=grid * kernel[0],
    patch_size=kernel[0],
    pool=pool,
    cls_token=pool == "cls",
    **_read_trunk(store, "img/Transformer"),
  )
  if not any(name.startswith("txt/") for name in names):
    return ModelSpec(image=image)
  log.warning("No tokenizer in the archive: pass one to encode text.")
  text = TextSpec(
    vocab_size=store.shape("txt/Embed_0/embedding", 2)[0],
    length=store.shape("txt/pos_embedding", 3)[1],
    projection=store.shape("txt/head/kernel", 2)[1],
    **_read_trunk(store, "txt/Encoder_0"),
  )
  return ModelSpec(image=image, text=text)


def _param_mapping(spec: ModelSpec, names: Collection[str]) -> list[Rule]:
  special = []
  if spec.text is not None and "b" in names:
    special = tables.scale_and_bias("t", "b")
  elif spec.text is not None:
    special = [tables.scale_without_bias("t", (1,))]
  return tables.tower_rules(
    spec, _NAMES, *special, layout="flax", num_unit_axes=_NUM_UNIT_AXES
  )
