"""OWLv2 model (Minderer et al. 2023), and the reader of its folders.

CLIP towers with one box per patch: each patch token, multiplied by the CLS
token, predicts a box, an embedding to compare with phrases, and objectness.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers as hf_tokenizers
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PyTree
from tokenizers import models, normalizers, pre_tokenizers
from tokenizers import processors as post_processors

from mtv_jax.config import foreign
from mtv_jax.convert import clip, hf_files, processors, tables, tensors
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.data import tokenizers
from mtv_jax.models import layers
from mtv_jax.models.text import TextTower
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViT
from mtv_jax.utils.errors import InputError, MissingFileError
from mtv_jax.utils.tree import pytree_dataclass

_EPS = 1e-4  # Bounds the logits of coordinates at the border.
_NORM_EPS = 1e-6  # Added to the norm of embeddings.


@pytree_dataclass
class Proposals:
  """Predictions for the p patches of images, independent of phrases."""

  embeddings: Float32[Array, "b p e"]  # Unit length.
  shift: Float32[Array, "b p"]  # Added to the cosines with phrases.
  scale: Float32[Array, "b p"]  # Multiplies the sum.
  # (y0, x0, y1, x1) in the padded image's unit square; may exceed it.
  boxes: Float32[Array, "b p 4"]
  objectness: Float32[Array, "b p"]  # Logits.

  def logits(
    self, queries: Float32[Array, "b q e"], valid: Bool[Array, "b q"]
  ) -> Float32[Array, "b p q"]:
    """Computes logits of each patch for each query of `Owlv2.queries`.

    A single row of queries is broadcast over images. For queries that are
    not `valid` (padding), returns the smallest float32.
    """
    queries = jnp.broadcast_to(
      queries, (len(self.embeddings), *queries.shape[1:])
    )
    # High precision: small differences of cosines are scaled up.
    cosines = jnp.einsum(
      "bpe,bqe->bpq",
      self.embeddings,
      queries,
      precision=jax.lax.Precision.HIGHEST,
    )
    logits = (cosines + self.shift[..., None]) * self.scale[..., None]
    return jnp.where(valid[:, None], logits, jnp.finfo(jnp.float32).min)


class Owlv2(nn.Module):
  """OWLv2 detector; patch tokens are not projected.

  Towers and hidden layers of the heads compute in `dtype`, last layers in
  float32. `scan` runs blocks in a loop, see `stack.run_stack`.
  """

  spec: ModelSpec
  dtype: Any = jnp.float32
  scan: bool = True

  def setup(self):
    spec = self.spec
    width = spec.image.width
    self.image = ViT(spec.image, dtype=self.dtype, scan=self.scan)
    self.text = TextTower(spec.text, dtype=self.dtype, scan=self.scan)
    self.merge_norm = nn.LayerNorm(
      spec.image.norm_eps, dtype=self.dtype, use_fast_variance=False
    )
    self.boxes = _Head(width, 4, self.dtype)
    self.objectness = _Head(width, 1, self.dtype)
    self.classes = _Classes(spec.text.projection)

  def __call__(
    self, images: Float[Array, "b s s 3"], tokens: Int[Array, "b q t"]
  ) -> tuple[Proposals, Float32[Array, "b p q"]]:
    """Runs both towers; returns patches and their logits.

    A query whose first id is 0 is padding, as in `transformers`.
    """
    b, q, t = tokens.shape
    queries = self.queries(tokens.reshape(b * q, 1, t)).reshape(b, q, -1)
    patches = self.detect(images)
    return patches, patches.logits(queries, tokens[..., 0] > 0)

  def detect(self, images: Float[Array, "b s s 3"]) -> Proposals:
    """Predicts proposals for normalised, padded images."""
    out = self.image(images)
    merged = self.merge_norm(out.patches * out.prefix[:, :1])
    grid = self.spec.image.grid_of(*images.shape[1:3])
    # (x, y, width, height), reversed to (height, width, y, x).
    raw = self.boxes(merged) + box_bias(grid)
    sizes, centre = jnp.split(jax.nn.sigmoid(raw)[..., ::-1], 2, axis=-1)
    half = sizes / 2
    embeddings, shift, scale = self.classes(merged)
    return Proposals(
      embeddings=embeddings,
      shift=shift,
      scale=scale,
      boxes=jnp.concatenate([centre - half, centre + half], axis=-1),
      objectness=self.objectness(merged)[..., 0],
    )

  def queries(self, tokens: Int[Array, "n k t"]) -> Float32[Array, "n e"]:
    """Embeds phrases; each embedding is the mean over its k prompts.

    The mean is not normalised again: OWL-ViT averages logits over prompts
    (Minderer et al. 2022), and logits are linear in the embedding.
    """
    n, k, t = tokens.shape
    pooled = self.text(tokens.reshape(n * k, t)).pooled
    units = _normalize(_normalize(pooled, eps=0.0))
    return units.reshape(n, k, -1).mean(axis=1)


class _Head(nn.Module):
  """Three dense layers with exact GELU; float32 output."""

  width: int
  out: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = layers.Mlp(self.width, "exact", dtype=self.dtype, name="mlp")(x)
    x = layers.gelu(x, "exact")
    return nn.Dense(self.out, dtype=jnp.float32, name="last")(x)


class _Classes(nn.Module):
  """Patch embeddings, with the shift and scale of their similarities."""

  features: int

  @nn.compact
  def __call__(self, x):
    def dense(features, name):
      return nn.Dense(features, dtype=jnp.float32, name=name)(x)

    shift, scale = dense(1, "shift"), dense(1, "scale")
    embeddings = _normalize(dense(self.features, "projection"))
    return embeddings, shift[..., 0], jax.nn.elu(scale[..., 0]) + 1


def _normalize(x, eps=_NORM_EPS):
  return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + eps)


def box_bias(grid: tuple[int, int]) -> Float32[np.ndarray, "p 4"]:
  """Bias of the boxes of a grid's patches, as logits of (x, y, width, height).

  The bias is a patch-sized box at the patch's lower right corner.
  """
  rows, columns = grid
  y, x = np.mgrid[1 : rows + 1, 1 : columns + 1].astype(np.float32)
  sizes = np.ones_like(x)
  fractions = np.stack(
    [x / columns, y / rows, sizes / columns, sizes / rows], axis=-1
  ).reshape(-1, 4)
  return np.log(fractions + _EPS) - np.log1p(-fractions + _EPS)


# Defaults that differ from CLIP's.
_VISION_DEFAULTS = {"image_size": 768, "patch_size": 16}
_TEXT_DEFAULTS = {"max_position_embeddings": 16}
_IGNORE = r"position_ids$|^box_bias$"
_HEADS = {
  "merge_norm": "layer_norm",
  "classes/projection": "class_head.dense0",
  "classes/shift": "class_head.logit_shift",
  "classes/scale": "class_head.logit_scale",
  "boxes/mlp/fc1": "box_head.dense0",
  "boxes/mlp/fc2": "box_head.dense1",
  "boxes/last": "box_head.dense2",
  "objectness/mlp/fc1": "objectness_head.dense0",
  "objectness/mlp/fc2": "objectness_head.dense1",
  "objectness/last": "objectness_head.dense2",
}
VOCABULARY = "vocab.json"
MERGES = "merges.txt"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# Radford et al. 2021: contractions, letters, single digits, punctuation.
_WORD = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
  r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
  """CLIP's BPE tokenizer, equivalent to `CLIPTokenizer` in `transformers`.

  For folders with `vocab.json` and `merges.txt`, without `tokenizer.json`:
  byte-level BPE on lower-cased text, with `</w>` at the end of words.
  """

  def __init__(self, folder: str | os.PathLike):
    files = [pathlib.Path(folder) / name for name in (VOCABULARY, MERGES)]
    for file in files:
      if not file.is_file():
        raise MissingFileError(
          f"There is no {file}. A tokenizer needs tokenizer.json, or "
          f"{VOCABULARY} and {MERGES}: copy them from the model's processor."
        )
    try:
      vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
      lines = files[1].read_text(encoding="utf-8").splitlines()
      pairs = [tuple(s.split()) for s in lines if not s.startswith("#version")]
      merges = [pair for pair in pairs if pair]
      special_tokens = [(token, vocabulary[token]) for token in (_START, _END)]
      model = models.BPE(
        vocabulary, merges, end_of_word_suffix="</w>", unk_token=_END
      )
    except (KeyboardInterrupt, SystemExit):
      raise
    except BaseException as error:
      # The library raises bare Exception; its panics are BaseException.
      raise InputError(
        f"{files[0]} and {MERGES} are not CLIP's ({error!r}): expected a "
        f"vocabulary of token ids with {_START} and {_END}, and a merge of two "
        "tokens per line."
      ) from error
    self._end = vocabulary[_END]
    self._model = hf_tokenizers.Tokenizer(model)
    self._model.normalizer = normalizers.Sequence(
      [
        normalizers.NFC(),
        normalizers.Replace(hf_tokenizers.Regex(r"\s+"), " "),
        normalizers.Lowercase(),
      ]
    )
    self._model.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(
          hf_tokenizers.Regex(_WORD), behavior="removed", invert=True
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
    self._model.post_processor = post_processors.TemplateProcessing(
      single=f"{_START} $A {_END}", special_tokens=special_tokens
    )
    self._model.add_special_tokens([_START, _END])

  def encode(
    self, strings: Sequence[str], length: int
  ) -> Int32[np.ndarray, "n length"]:
    """Encodes strings between start and end; truncates or pads with end ids."""
    ids = np.full((len(strings), length), self._end, np.int32)
    encodings = self._model.encode_batch(list(strings))
    # The last id stays, so that truncated texts end with the end token.
    for row, encoding in zip(ids[:, :-1], encodings, strict=True):
      part = encoding.ids[: length - 1]
      row[: len(part)] = part
    return ids


@dataclasses.dataclass(frozen=True)
class Owlv2Files:
  """Content of an OWLv2 folder: the model and its processor."""

  spec: ModelSpec
  params: dict[str, Any]  # NumPy float32.
  mean: tuple[float, ...]  # By channel, for pixels in [0, 1].
  std: tuple[float, ...]
  tokenizer: tokenizers.Tokenizer | ClipTokenizer
  tokenizer_hash: str


def read(folder: str | os.PathLike) -> Owlv2Files:
  """Reads a folder of `Owlv2ForObjectDetection.save_pretrained`.

  Needs a tokenizer (`tokenizer.json`, or `vocab.json` and `merges.txt`);
  `processor_config.json` or `preprocessor_config.json` is optional.
  """
  path, config = hf_files.read_config(
    folder, model_type="owlv2", example="google/owlv2-base-patch16-ensemble"
  )
  with foreign.errors_of(path / "config.json"):
    spec = read_spec(config)
  with hf_files.open_weights(path) as store:
    params = tensors.load(param_mapping(spec), store, ignore=_IGNORE)
  # CLIP's temperature, meant for whole images, is unused.
  del params["heads"]
  _, processor = hf_files.read_processor(path)
  digest = hashlib.blake2b(digest_size=8)
  for name in ("tokenizer.json", VOCABULARY, MERGES):
    if (path / name).is_file():
      digest.update((path / name).read_bytes())
  return Owlv2Files(
    spec=spec,
    params=params,
    mean=tuple(processor.get("image_mean") or processors.CLIP_MEAN),
    std=tuple(processor.get("image_std") or processors.CLIP_STD),
    tokenizer=read_tokenizer(path),
    tokenizer_hash=digest.hexdigest(),
  )


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
  """Reads the towers' spec from the content of `config.json`."""
  name = "text_config"
  text = hf_files.with_defaults(config.get(name), _TEXT_DEFAULTS, name)
  text.setdefault("hidden_size", clip.Clip.text.defaults["hidden_size"])
  width = hf_files.with_defaults(config, {"projection_dim": 512})
  width = width["projection_dim"]
  if width != text["hidden_size"]:
    raise ConversionError(
      f"projection_dim={width} differs from the text tower's hidden_size, "
      f"{text['hidden_size']}: OWLv2 compares patches and phrases of one width."
    )
  # With eos_token_id=2, transformers' CLIP pools at the highest id.
  text["eos_token_id"] = 2
  name = "vision_config"
  vision = hf_files.with_defaults(config.get(name), _VISION_DEFAULTS, name)
  sections = dict(vision_config=vision, text_config=text, projection_dim=width)
  return clip.CLIP.read_spec(
    {"model_type": "clip", **sections}, ["text_model."]
  )


def abstract_params(spec: ModelSpec) -> dict[str, PyTree]:
  """Names and shapes of the parameters of `Owlv2`."""
  patch = spec.image.patch_size
  return jax.eval_shape(
    Owlv2(spec).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, patch, patch, 3), np.float32),
    jax.ShapeDtypeStruct((1, 1, spec.text.length), np.int32),
  )["params"]


def param_mapping(spec: ModelSpec) -> list[Rule]:
  """Conversion rules for OWLv2."""
  params = abstract_params(spec)
  heads = {k: v for k, v in params.items() if k not in ("image", "text")}

  def rename(name: str) -> str:
    # Only CLIP's files have the misspelt name.
    return "owlv2." + name.replace("pre_layrnorm", "pre_layernorm")

  towers = [
    dataclasses.replace(rule, tensors=tuple(map(rename, rule.tensors)))
    for rule in clip.CLIP.param_mapping(spec)
  ]
  return [*towers, *tables.leaf_rules(heads, _HEADS)]


def read_tokenizer(
  folder: pathlib.Path,
) -> tokenizers.Tokenizer | ClipTokenizer:
  """Reads a folder's tokenizer, in either file format."""
  if (folder / "tokenizer.json").is_file():
    return tokenizers.build_tokenizer(folder / "tokenizer.json", clean="none")
  return ClipTokenizer(folder)
