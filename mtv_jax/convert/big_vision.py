"""Reader of big_vision's SigLIP checkpoints (NumPy archives).

Names and shapes are those of its two-tower model: `img` (a ViT), `txt` (a
transformer with a dense `head`), `t` (log of the temperature's inverse) and
`b`. Blocks are stacked in one `encoderblock` where it scanned over them, and
numbered `encoderblock_0`, ... where it did not.
"""

from __future__ import annotations

import logging
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping

import numpy as np

from mtv_jax.convert import checks, tables
from mtv_jax.convert.converted import Converted
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.convert.tables import FLAX, ConversionError, Rule
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.utils.errors import MissingFileError, did_you_mean

log = logging.getLogger(__name__)

NAMES = tables.BlockNames(
  norm1="LayerNorm_0",
  q="MultiHeadDotProductAttention_0/query",
  k="MultiHeadDotProductAttention_0/key",
  v="MultiHeadDotProductAttention_0/value",
  out="MultiHeadDotProductAttention_0/out",
  norm2="LayerNorm_1",
  mlp="MlpBlock_0",
)
# SigLIP's images are stretched to a square and scaled to -1..1; its resize is
# tf.image.resize, bilinear, which does not antialias unless it is told to.
_PREPROCESS = {
  "resize": "squash",
  "crop": "none",
  "interpolation": "bilinear",
  "antialias": False,
  "mean": (0.5, 0.5, 0.5),
  "std": (0.5, 0.5, 0.5),
}


class _Archive:
  """An archive's parameters, under the names that numbered blocks have."""

  def __init__(self, arrays: Mapping[str, np.ndarray]):
    self._arrays: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
      if "/encoderblock/" not in name:
        self._arrays[name] = array
        continue
      for i, layer in enumerate(array):
        block = name.replace("/encoderblock/", f"/encoderblock_{i}/")
        self._arrays[block] = layer

  @property
  def names(self) -> list[str]:
    return list(self._arrays)

  def shape(self, name: str) -> tuple[int, ...]:
    """Raises ConversionError, saying what there is, for an unknown name."""
    if name not in self._arrays:
      raise ConversionError(
        f"The archive has no {name!r}, so it is not a SigLIP of big_vision. "
        f"{did_you_mean(name, self._arrays, limit=8)}"
      )
    return self._arrays[name].shape

  def read(self, name: str) -> np.ndarray:
    array = self._arrays[name]
    if array.dtype.kind != "V":
      return array
    # NumPy knows no bfloat16 and stores it as two bytes without a meaning:
    # they are the upper half of a float32.
    halves = np.ascontiguousarray(array).view(np.uint16).reshape(array.shape)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def read(
  path: str | os.PathLike,
  *,
  tokenizer: str | os.PathLike | None = None,
  clean: str = "canonicalize",
) -> Converted:
  """Reads a SigLIP (or SigLIP 2, fixed resolution) checkpoint.

  Args:
    path: of the `.npz`, with or without an optimizer's state.
    tokenizer: the SentencePiece model or `tokenizer.json` that goes with it,
      which the archive does not hold.
    clean: of the text, see `data.tokenizers`.

  Raises:
    MissingFileError: there is no such file.
    ConversionError: not an archive, a NaFlex or another model, or arrays that
      are missing, unexpected or of another shape, each named.
  """
  path = pathlib.Path(path)
  store = _Archive(_parameters(path))
  spec = _spec(store)
  rules = _rules(spec, bias="b" in store.names)
  checks.check(rules, store, what=str(path))
  size = spec.image.image_size
  files = None
  if tokenizer is not None:
    files = TokenizerFiles(pathlib.Path(tokenizer), clean)
  elif spec.text is not None:
    log.warning("No tokenizer given: text can't be encoded without one.")
  return Converted(
    spec=spec,
    params=tables.load(rules, store),
    preprocess={"size": size, **_PREPROCESS},
    tokenizer=files,
  )


def _parameters(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The archive's parameters, without the optimizer's state."""
  if not path.is_file():
    raise MissingFileError(f"There is no file {path}; a .npz is expected.")
  # What is no archive NumPy would call a pickle, and advise to load as one.
  if not zipfile.is_zipfile(path):
    with path.open("rb") as file:
      start = file.read(16)
    raise ConversionError(
      f"{path} is not an .npz archive, or is cut short: it starts with"
      f" {start!r}. A checkpoint of big_vision is expected, such as"
      " webli_en_b16_224_63724782.npz; folders of Hugging Face are from_hf's."
    )
  try:
    archive = np.load(path, allow_pickle=False)
  except (ValueError, zipfile.BadZipFile, EOFError) as error:
    raise ConversionError(f"{path} is not an .npz archive: {error}") from None
  prefix = ""
  for candidate in ("params/", "opt/target/"):
    if any(name.startswith(candidate) for name in archive.files):
      prefix = candidate
      break
  with archive:
    try:
      return {
        name.removeprefix(prefix): archive[name]
        for name in archive.files
        if name.startswith(prefix)
      }
    except ValueError as error:
      raise ConversionError(f"{path}: {error}") from None


def _trunk(store: _Archive, prefix: str) -> dict[str, int]:
  """Width, depth, heads and mlp_dim of an encoder, from its shapes."""
  blocks = [
    int(found[1])
    for name in store.names
    if (found := re.match(rf"{prefix}/encoderblock_(\d+)/", name))
  ]
  first = f"{prefix}/encoderblock_0"
  width, heads, _ = store.shape(f"{first}/{NAMES.q}/kernel")
  _, mlp_dim = store.shape(f"{first}/{NAMES.mlp}/Dense_0/kernel")
  return {
    "width": width,
    "depth": max(blocks) + 1,
    "heads": heads,
    "mlp_dim": mlp_dim,
  }


def _spec(store: _Archive) -> ModelSpec:
  """The model that the arrays' shapes describe."""
  names = set(store.names)
  kernel = store.shape("img/embedding/kernel")
  if len(kernel) != 4:
    raise ConversionError(
      f"img/embedding/kernel is {kernel}, not a convolution's: this is a "
      "NaFlex checkpoint (variable aspect ratio), which is not supported. "
      "SigLIP 2 checkpoints of fixed resolution are."
    )
  if "img/head/kernel" in names:
    raise ConversionError(
      "img/head projects the image with a bias, which our image towers don't "
      "have; SigLIP's have no head at all."
    )
  pool = "map" if "img/MAPHead_0/probe" in names else "mean"
  if "img/cls" in names:
    pool = "cls"
  grid = round(store.shape("img/pos_embedding")[1] ** 0.5)
  image = ViTSpec(
    image_size=grid * kernel[0],
    patch_size=kernel[0],
    pool=pool,
    cls_token=pool == "cls",
    **_trunk(store, "img/Transformer"),
  )
  if not any(name.startswith("txt/") for name in names):
    return ModelSpec(image=image)
  text = TextSpec(
    vocab_size=store.shape("txt/Embed_0/embedding")[0],
    length=store.shape("txt/pos_embedding")[1],
    projection=store.shape("txt/head/kernel")[1],
    **_trunk(store, "txt/Encoder_0"),
  )
  return ModelSpec(image=image, text=text)


def _rules(spec: ModelSpec, *, bias: bool) -> list[Rule]:
  rules = _image_rules(spec.image)
  if spec.text is None:
    return rules
  rules += _text_rules(spec.text)
  head = "heads/contrastive"
  if bias:
    return [
      *rules,
      tables.reshaped(f"{head}/logit_scale", "t", (), (1,)),
      tables.reshaped(f"{head}/logit_bias", "b", (), (1,)),
    ]
  scale = Rule(
    (f"{head}/logit_scale", f"{head}/logit_bias"),
    ("t",),
    ((1,),),
    to_ours=lambda a: (a.reshape(()), np.zeros((), np.float32)),
  )
  return [*rules, scale]


def _encoder_rules(
  ours: str, theirs: str, spec: ViTSpec | TextSpec
) -> list[Rule]:
  width = spec.width
  return [
    *tables.blocks(
      FLAX,
      f"{ours}/blocks",
      f"{theirs}/encoderblock_{{i}}",
      NAMES,
      width=width,
      heads=spec.heads,
      mlp_dim=spec.mlp_dim,
      depth=spec.depth,
    ),
    *tables.norm(FLAX, f"{ours}/norm", f"{theirs}/encoder_norm", width),
  ]


def _image_rules(spec: ViTSpec) -> list[Rule]:
  width, patch, positions = spec.width, spec.patch_size, spec.grid**2
  rules = [
    # Flax's convolution has our order of rows already: (py, px, c).
    tables.reshaped(
      "image/patch_embed/kernel",
      "img/embedding/kernel",
      (patch * patch * 3, width),
      (patch, patch, 3, width),
    ),
    tables.vector("image/patch_embed/bias", "img/embedding/bias", width),
    tables.reshaped(
      "image/position_embedding",
      "img/pos_embedding",
      (positions, width),
      (1, positions, width),
    ),
    *_encoder_rules("image", "img/Transformer", spec),
  ]
  if spec.cls_token:
    token = (1, 1, width)
    rules.append(tables.reshaped("image/cls_token", "img/cls", (width,), token))
  if spec.pool != "map":
    return rules
  head, ours = "img/MAPHead_0", "image/pool"
  attention = f"{head}/MultiHeadDotProductAttention_0"
  merge = (spec.heads, width // spec.heads, width)
  return [
    *rules,
    tables.reshaped(f"{ours}/probe", f"{head}/probe", (width,), (1, 1, width)),
    *tables.fused(
      FLAX, f"{ours}/attention/q", [f"{attention}/query"], width, spec.heads
    ),
    *tables.fused(
      FLAX,
      f"{ours}/attention/kv",
      [f"{attention}/key", f"{attention}/value"],
      width,
      spec.heads,
    ),
    *tables.dense(
      FLAX,
      f"{ours}/attention/out",
      f"{attention}/out",
      width,
      width,
      split=merge,
    ),
    *tables.norm(FLAX, f"{ours}/norm", f"{head}/LayerNorm_0", width),
    *tables.mlp(FLAX, f"{ours}/mlp", f"{head}/MlpBlock_0", width, spec.mlp_dim),
  ]


def _text_rules(spec: TextSpec) -> list[Rule]:
  width = spec.width
  table, positions = (spec.vocab_size, width), (spec.length, width)
  return [
    tables.reshaped(
      "text/token_embedding", "txt/Embed_0/embedding", table, table
    ),
    tables.reshaped(
      "text/position_embedding", "txt/pos_embedding", positions, (1, *positions)
    ),
    *_encoder_rules("text", "txt/Encoder_0", spec),
    *tables.dense(FLAX, "text/projection", "txt/head", width, spec.projection),
  ]
