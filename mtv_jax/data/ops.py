"""Host ops, applied in order to turn a record into a row of the batch.

A config lists them: `data.ops = "decode|canvas(384)|caption(64)"`. To add an
op, write a `HostOp` and register it in `OPS`.

Missing labels give zeros, so that one batch can mix sources with different
labels. Ops count the label parts they leave out in the record's `dropped`, and
describe texts in `texts`: whether they were truncated or have unknown words.
"""

import dataclasses
import functools
import inspect
import itertools
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from jaxtyping import Int32, UInt8

from mtv_jax.config.feature_layout import FeatureLayout, field_name
from mtv_jax.config.op_strings import build_op, parse_ops
from mtv_jax.config.options import Fraction, PositiveInt, Range, Side
from mtv_jax.data import canvas as canvas_lib
from mtv_jax.data.conversations import ConversationOp
from mtv_jax.data.host_op import Field, HostOp
from mtv_jax.data.labels import label_values
from mtv_jax.data.records import (
  BadRecord,
  Record,
  content_errors,
  count_dropped,
)
from mtv_jax.data.tokenizers.base import MAX_CHARACTERS, Tokenizer
from mtv_jax.utils.errors import InputError, did_you_mean

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TextOp(HostOp):
  """An op that uses the text tower's tokenizer."""

  tokenizer: Tokenizer | None = dataclasses.field(default=None, kw_only=True)

  random = True

  def __post_init__(self):
    if self.tokenizer is None:
      name = type(self).__name__.removesuffix("Op").lower()
      raise InputError(
        f"data.ops has `{name}` but the model has no tokenizer: set"
        " model.text.tokenizer, or drop the op."
      )

  def _encode(
    self, text: str, length: int, key: str
  ) -> tuple[Int32[np.ndarray, " length"], bool]:
    """Returns the token ids, and whether the text was truncated."""
    return self._call_encoder(self.tokenizer.encode_text, text, length, key)

  def _call_encoder(
    self, encode: Callable[[str, int], T], text: str, length: int, key: str
  ) -> T:
    """Returns `encode(text, length)`; raises BadRecord for unusable texts."""
    if len(text) > MAX_CHARACTERS:
      count = f"{len(text):,} characters; at most {MAX_CHARACTERS:,}"
      raise BadRecord(key, f"a text has {count} are tokenized")
    try:
      return encode(text, length)
    except UnicodeError as error:
      reason = f"the text {text!r} is not Unicode ({error})"
      raise BadRecord(key, reason) from error


# Batch field that no op adds: index of the row's source in `data.train`.
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
  registry = dict(OPS) | {
    "features": functools.partial(FeaturesOp, layouts=features)
  }
  for name, op in OPS.items():
    if issubclass(op, TextOp):
      registry[name] = functools.partial(op, tokenizer=tokenizer)

  def is_read(name: str) -> bool:
    if batch_fields is None or name not in OPS or not OPS[name].is_optional:
      return True
    if OPS[name] is FeaturesOp:
      return bool(features)
    return not OPS[name].batch_fields.keys().isdisjoint(batch_fields)

  # Filter before building: an unused op may need a tokenizer that is missing.
  parsed = filter(lambda op: is_read(op.name), parse_ops(text, unique=True))
  ops = {op.name: build_op(op, registry, "data op") for op in parsed}
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


def phrase_length(text: str) -> int | None:
  """Returns `phrase_length` of the op `regions`, or None without this op."""
  for op in parse_ops(text):
    if op.name == "regions":
      arguments = inspect.signature(RegionsOp).bind(*op.args, **op.kwargs)
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
    image, key = _get_field(record, "image"), record["key"]
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
    image, key = _get_field(record, "image"), record["key"]
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
    image = _get_field(record, "image")
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
        ids, is_cut = self._encode(text, self.length, record["key"])
        fields = {"caption": ids, "caption_valid": np.bool_(True)}
        text = ("captions", is_cut, self.tokenizer.has_unknown(ids))
        return _add_texts(record | fields, [text])
    if captions:
      reason = f"all of its captions are empty: {captions[:3]!r}"
      raise BadRecord(record["key"], reason)
    ids = np.full(self.length, self.tokenizer.pad_id, np.int32)
    return record | {"caption": ids, "caption_valid": np.bool_(False)}


@dataclasses.dataclass(frozen=True)
class DepthOp(HostOp):
  """Inverse depth, scaled to 1..65535 from minimum to maximum; 0: no label.

  A stored label of this size is unchanged. Other sizes and floats are resampled
  and scaled; see `label_values.make_depth`.
  """

  size: Side
  min_valid: PositiveInt = label_values.MIN_VALID

  is_optional = True
  batch_fields = {"depth": (("size", "size"), np.uint16)}
  record_fields = frozenset(["depth"])

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    shape = (self.size, self.size)
    unlabelled = np.zeros(shape, np.uint16)
    depth = record.get("depth")
    if depth is None:
      return record | {"depth": unlabelled}
    valid = None
    if depth.dtype == np.uint16:
      if depth.shape == shape:
        return record | {"depth": depth}
      valid, depth = depth > 0, depth.astype(np.float32)
    outcome = label_values.make_depth(
      depth, side=self.size, valid=valid, min_valid=self.min_valid
    )
    count_dropped(record, outcome.counts)
    depth = outcome.label.values if outcome.label else unlabelled
    return record | {"depth": depth}


@dataclasses.dataclass(frozen=True)
class RegionsOp(TextOp):
  """At most `count` boxes, random or by score, with phrases as token ids.

  Leaves out boxes that are unusable (`label_values.make_boxes`) or whose phrase
  has no tokens.
  """

  count: PositiveInt
  # The end of sequence takes one token.
  phrase_length: Annotated[int, Range(min=2)] = 16
  pick: Literal["random", "score"] = "random"
  min_score: Fraction = 0.0  # Leaves out boxes below it.

  is_optional = True
  batch_fields = {
    "boxes": (("count", 4), np.float32),
    "box_phrase": (("count", "phrase_length"), np.int32),
    "box_phrase_id": (("count",), np.uint32),
    "box_score": (("count",), np.float32),
    "box_valid": (("count",), np.bool_),
  }
  record_fields = frozenset(["boxes", "phrases"])

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    seed = int(rng.integers(2**63))
    label = _make_box_label(record)
    if self.pick == "score":
      order = np.argsort(-label.scores, kind="stable")
    else:
      # Shuffled even if all fit: an objective may read only the first boxes.
      order = np.random.default_rng(seed).permutation(len(label.scores))
    row = {k: np.zeros(f.shape, f.dtype) for k, f in self.fields.items()}
    slot, texts = 0, []
    for box in order[label.scores[order] >= self.min_score]:
      if slot == self.count:
        break
      phrase = label.phrases[box]
      ids, is_cut, phrase_id = self._call_encoder(
        functools.partial(_encode_phrase, self.tokenizer),
        *(phrase, self.phrase_length, record["key"]),
      )
      if ids is None:
        count_dropped(record, {"boxes: a phrase of no tokens": 1})
        continue
      texts.append(("phrases", is_cut, self.tokenizer.has_unknown(ids)))
      row["boxes"][slot] = label.boxes[box]
      row["box_phrase"][slot] = ids
      row["box_phrase_id"][slot] = phrase_id
      row["box_score"][slot] = label.scores[box]
      row["box_valid"][slot] = True
      slot += 1
    return _add_texts(record | row, texts)


@dataclasses.dataclass(frozen=True)
class FeaturesOp(HostOp):
  """Teacher features read from label sets, quantized to 8 bits."""

  layouts: Mapping[str, FeatureLayout] = dataclasses.field(
    default_factory=dict, kw_only=True
  )

  is_optional = True
  record_fields = frozenset(["features"])

  @functools.cached_property
  def fields(self) -> dict[str, Field]:
    return {
      name: Field(shape, np.dtype(dtype))
      for teacher, layout in self.layouts.items()
      for name, (shape, dtype) in layout.fields(teacher).items()
    }

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    row = {k: np.zeros(f.shape, f.dtype) for k, f in self.fields.items()}
    labels = record.get("features") or {}
    for teacher, layout in self.layouts.items():
      label = labels.get(teacher)
      if label is None:
        continue
      if problem := label.problem_with(layout):
        raise InputError(
          f"The features of {teacher!r} in its label set {problem}. Label the"
          f" shards again, as config.teachers.{teacher} says."
        )
      row[field_name(teacher, "valid")] = np.bool_(True)
      for name in layout.shapes:
        array = label.arrays[name]
        row[field_name(teacher, name)] = array.codes
        row[field_name(teacher, name, "scale")] = array.scale
    return record | row


OPS: dict[str, type[HostOp]] = {
  "decode": DecodeOp,
  "canvas": CanvasOp,
  "caption": CaptionOp,
  "conversation": ConversationOp,
  "depth": DepthOp,
  "regions": RegionsOp,
  "features": FeaturesOp,
}


@functools.lru_cache(maxsize=1 << 14)
def _encode_phrase(
  tokenizer: Tokenizer, phrase: str, length: int
) -> tuple[Int32[np.ndarray, " length"] | None, bool, int]:
  """Returns ids (None if blank), whether they were cut, and the phrase's id."""
  ids, is_cut = tokenizer.encode_text(phrase, length)
  blank_ids, _ = tokenizer.encode_text("", length)
  ids = None if (ids == blank_ids).all() else ids
  return ids, is_cut, label_values.phrase_id(phrase)


def _add_texts(record: Record, texts: Sequence[tuple]) -> Record:
  """Adds the (kind, is_cut, has_unknown) of texts to `texts`."""
  return record | {"texts": [*record.get("texts", ()), *texts]}


def _make_box_label(record: Record) -> label_values.BoxLabel:
  """Returns the usable boxes of a record; may be empty."""
  if "boxes" not in record:
    boxes, scores = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    return label_values.BoxLabel(boxes, (), scores)
  try:
    outcome = label_values.make_boxes(
      record["boxes"], _get_field(record, "phrases"), record.get("box_scores")
    )
  except ValueError as error:
    raise BadRecord(record["key"], f"its label has {error}") from error
  count_dropped(record, outcome.counts)
  return outcome.label


def _get_field(record: Record, field: str) -> Any:
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
