"""Host ops, applied in order to turn a record into a row of the batch.

A config lists them: `data.ops = "decode|canvas(384)|caption(64)"`. To add an
op, write a `HostOp` and register it in `OPS`.

Missing labels give zeros, so that one batch can mix sources with different
labels. Ops count the label parts they leave out in the record's `dropped`, and
texts that were cut or have unknown words in `texts`.

From a caption to token ids: `CaptionOp` here, `tokenizers.source` (which
tokenizer), `tokenizers.base` and the tokenizer's own module.
"""

import abc
import dataclasses
import functools
import inspect
import itertools
import zlib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import UInt8

from mtv_jax.config.feature_layout import FeatureLayout
from mtv_jax.config.op_strings import build_op, parse_ops
from mtv_jax.config.options import PositiveInt, Side
from mtv_jax.config.registry import LazyRegistry
from mtv_jax.data import canvas as canvas_lib
from mtv_jax.data.records import BadRecord, Record, content_errors, count_text
from mtv_jax.data.tokenizers.base import MAX_CHARACTERS, Tokenizer
from mtv_jax.utils.errors import InputError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Field:
  """Shape and dtype of a row of one batch field."""

  shape: tuple[int, ...]
  dtype: np.dtype


class HostOp(abc.ABC):
  """An op in `data.ops`: a frozen dataclass whose fields are its arguments."""

  # Whether the op draws random numbers; `rng` is None if not.
  random: ClassVar[bool] = False
  # Shape and dtype of each batch field that the op adds; a string in a shape
  # names the argument with the length.
  batch_fields: ClassVar[Mapping[str, tuple[tuple[int | str, ...], Any]]] = {}
  # Arguments that the run passes, not the config: "tokenizer", "layouts".
  run_arguments: ClassVar[tuple[str, ...]] = ()
  # Whether to leave the op out if the run reads none of these fields.
  is_optional: ClassVar[bool] = False
  # Each must exist in at least one source, or the op would only add zeros.
  record_fields: ClassVar[frozenset[str]] = frozenset()
  # At least one of these must exist in some source, unless the set is empty.
  any_record_field: ClassVar[frozenset[str]] = frozenset()

  @functools.cached_property
  def fields(self) -> dict[str, Field]:
    """The batch fields that the op adds."""
    return {
      name: Field(
        tuple(getattr(self, n) if isinstance(n, str) else n for n in shape),
        np.dtype(dtype),
      )
      for name, (shape, dtype) in self.batch_fields.items()
    }

  @abc.abstractmethod
  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    """Returns the new record; may modify its argument. Raises BadRecord."""


@dataclasses.dataclass(frozen=True)
class TextOp(HostOp):
  """An op that uses the text tower's tokenizer."""

  tokenizer: Tokenizer | None = dataclasses.field(default=None, kw_only=True)

  random = True
  run_arguments = ("tokenizer",)

  def __post_init__(self):
    if self.tokenizer is None:
      name = type(self).__name__.removesuffix("Op").lower()
      raise InputError(
        f"data.ops has `{name}` but the model has no tokenizer: set"
        " model.text.tokenizer, or drop the op."
      )

  def _check_length(self, text: str, key: str) -> None:
    if len(text) > MAX_CHARACTERS:
      count = f"{len(text):,} characters; at most {MAX_CHARACTERS:,}"
      raise BadRecord(key, f"a text has {count} are tokenized")


# Batch field that no op adds: index of the row's source in `data.train`.
# Folder of a run with the tokenizer of its conversations.
CONVERSATION_TOKENIZER = "conversation_tokenizer"
SOURCE = "source"


class Ops:
  """The sequence of ops of a config.

  `fields` are the batch fields. Each record field in `labels`, and at least one
  field of each set in `choices`, must exist in some source.
  """

  def __init__(self, text: str, ops: Mapping[str, HostOp]):
    self._text = text
    self._ops = [(k, op, zlib.crc32(k.encode())) for k, op in ops.items()]
    self.fields = {k: v for op in ops.values() for k, v in op.fields.items()}
    self.labels = frozenset().union(*(op.record_fields for op in ops.values()))
    choices = (op.any_record_field for op in ops.values())
    self.choices = [*filter(None, choices)]

  def __call__(self, record: Record, rng: np.random.Generator) -> Record:
    """Returns the record with the batch's `fields`; raises BadRecord.

    Any error counts as a bad record. If every record fails, the config is
    wrong, and the pipeline stops with the reason.
    """
    seed = int(rng.integers(2**63))
    for name, op, name_hash in self._ops:
      # An op's random numbers don't depend on which other ops run.
      op_rng = np.random.default_rng((seed, name_hash)) if op.random else None
      with content_errors(record["key"], f"the op `{name}` can't use it"):
        record = op(record, op_rng)
    return record

  def __repr__(self) -> str:
    return f"Ops({self._text!r})"


def build_ops(
  text: str,
  *,
  tokenizer: Tokenizer | None = None,
  batch_fields: Collection[str] | None = None,
  features: Mapping[str, FeatureLayout] = MappingProxyType({}),
) -> Ops:
  """Builds the ops in `text`: "decode|canvas(384)|caption(64, pick='first')".

  `batch_fields` are the fields that the run reads (None: all). Optional ops
  that add none of these are left out. `features` are the teachers' layouts.
  """
  given = {"tokenizer": tokenizer, "layouts": features}
  ops = {}
  for op in parse_ops(text, unique=True):
    if op.name not in OPS:
      build_op(op, OPS, "data op")  # Raises the error.
    cls = OPS[op.name]
    # Left out before it is built: it may need a tokenizer that is missing.
    if batch_fields is not None and cls.is_optional:
      fields = features if op.name == "features" else cls.batch_fields
      is_read = op.name == "features" or {*fields} & {*batch_fields}
      if not (fields and is_read):
        continue
    arguments = {name: given[name] for name in cls.run_arguments}
    factory = functools.partial(cls, **arguments) if arguments else cls
    ops[op.name] = build_op(op, {op.name: factory}, "data op")
  for name, following in itertools.pairwise(ops):
    if (name, following) != ("decode", "canvas"):
      continue
    if ops[following].antialias and not ops[name].exact:
      ops[name] = DecodeToCanvasOp(ops[following].size, ops[name].max_pixels)
  op_sequence = Ops(text, ops)
  if batch_fields is not None and SOURCE in batch_fields:
    op_sequence.fields[SOURCE] = Field((), np.dtype(np.int32))
  if not op_sequence.fields:
    example = "decode|canvas(224)|caption(64)"
    raise InputError(f"data.ops={text!r} adds no field; expected {example!r}.")
  return op_sequence


def find_op(text: str) -> Any:
  """Returns the `ConversationOp` of an ops string, or None."""
  for op in parse_ops(text):
    if op.name == "conversation":
      return build_op(op, OPS, "data op")
  return None


def phrase_length(text: str | None) -> int | None:
  """Returns `phrase_length` of the op `regions`, or None without this op."""
  for op in parse_ops(text) if text else ():
    if op.name == "regions":
      arguments = inspect.signature(OPS["regions"]).bind(*op.args, **op.kwargs)
      arguments.apply_defaults()
      return arguments.arguments["phrase_length"]
  return None


@dataclasses.dataclass(frozen=True)
class DecodeOp(HostOp):
  """Decodes an image file to RGB; converts arrays to RGB.

  Before `canvas`, it is replaced by `DecodeToCanvasOp` unless `exact` is set or
  the canvas is not antialiased.
  """

  max_pixels: PositiveInt = canvas_lib.MAX_PIXELS
  exact: bool = False

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    image, key = get_field(record, "image"), record["key"]
    if isinstance(image, np.ndarray):
      return record | {"image": _as_rgb(image, key)}
    image = canvas_lib.decode(image, key=key, max_pixels=self.max_pixels)
    return record | {"image": image}


@dataclasses.dataclass(frozen=True)
class DecodeToCanvasOp(HostOp):
  """Decodes to a canvas, see `canvas.decode_to_canvas`."""

  size: Side
  max_pixels: PositiveInt

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    image, key = get_field(record, "image"), record["key"]
    if isinstance(image, np.ndarray):
      return record | {"image": _as_rgb(image, key)}
    image, shape = canvas_lib.decode_to_canvas(
      image, self.size, key=key, max_pixels=self.max_pixels
    )
    return record | {"image": image, "image_size": np.array(shape, np.int32)}


@dataclasses.dataclass(frozen=True)
class CanvasOp(HostOp):
  """Squashes the whole image to a square and records its original size.

  Without `antialias`, `canvas.squash_bilinear` resizes from full resolution.
  """

  size: Side
  antialias: bool = dataclasses.field(default=True, kw_only=True)

  batch_fields = {
    "image": (("size", "size", 3), np.uint8),
    "image_size": ((2,), np.int32),
  }

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    image = get_field(record, "image")
    if not isinstance(image, np.ndarray):
      kind = type(image).__name__
      raise TypeError(f"the image is {kind}: put `decode` before `canvas`.")
    # After `DecodeToCanvasOp` the image is already a canvas; keep its size.
    size = record.get("image_size", np.array(image.shape[:2], np.int32))
    resize = canvas_lib.squash if self.antialias else canvas_lib.squash_bilinear
    image = resize(image, self.size)
    return record | {"image": image, "image_size": size}


@dataclasses.dataclass(frozen=True)
class CaptionOp(TextOp):
  """Token ids of one of the captions; skips captions blank after cleaning.

  A record with only blank captions is a bad record. A record without captions
  (image-only source) becomes a row of padding with `caption_valid` False.
  """

  length: PositiveInt
  pick: Literal["random", "first"] = "random"

  is_optional = True
  batch_fields = {
    "caption": (("length",), np.int32),
    "caption_valid": ((), np.bool_),
  }

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    captions = record.get("captions") or []
    start = 0
    if self.pick == "random":
      start = int(rng.integers(max(len(captions), 1)))
    for text in [*captions[start:], *captions[:start]]:
      if not self.tokenizer.is_blank(text):
        self._check_length(text, record["key"])
        ids, is_cut = self.tokenizer.encode_text(text, self.length)
        fields = {"caption": ids, "caption_valid": np.bool_(True)}
        has_unknown = self.tokenizer.has_unknown(ids)
        count_text(record, "captions", is_cut, has_unknown)
        return record | fields
    if captions:
      reason = f"all of its captions are empty: {captions[:3]!r}"
      raise BadRecord(record["key"], reason)
    ids = np.full(self.length, self.tokenizer.pad_id, np.int32)
    return record | {"caption": ids, "caption_valid": np.bool_(False)}


_LABEL_OPS = "mtv_jax.data.label_ops"
OPS: Mapping[str, type[HostOp]] = LazyRegistry(
  {
    "decode": DecodeOp,
    "canvas": CanvasOp,
    "caption": CaptionOp,
    "conversation": "mtv_jax.data.conversations:ConversationOp",
    "depth": f"{_LABEL_OPS}:DepthOp",
    "regions": f"{_LABEL_OPS}:RegionsOp",
    "features": f"{_LABEL_OPS}:FeaturesOp",
  }
)


def get_field(record: Record, field: str) -> Any:
  if field not in record:
    hint = did_you_mean(field, record)
    raise KeyError(f"record {record['key']!r} has no {field!r}. {hint}")
  return record[field]


def _as_rgb(image: np.ndarray, key: str) -> UInt8[np.ndarray, "h w 3"]:
  pixels = image[..., None] if image.ndim == 2 else image
  is_image = pixels.ndim == 3 and pixels.shape[2] in (1, 3) and image.size
  if image.dtype != np.uint8 or not is_image:
    actual = f"{image.dtype} {list(image.shape)}"
    expected = "uint8 [H, W, 3], [H, W, 1] or [H, W]"
    raise BadRecord(key, f"the image is {actual}; expected {expected}")
  return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
