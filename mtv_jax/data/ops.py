"""The host's ops: from a record to one row of the batch.

A config names them in order, `data.ops = "decode|canvas(384)|caption(64)"`.
An op takes a record and a random generator and returns the record changed; it
says which fields of the batch it makes. `OPS` holds a factory for each name:
a new op is a function there.

  decode                  bytes -> uint8 [H, W, 3]
  canvas(S)               -> image uint8 [S, S, 3], image_size int32 [2]
  caption(T, pick)        -> caption int32 [T], caption_valid bool []
  depth(D)                -> depth uint16 [D, D]
  regions(M, phrase_length, pick)
                          -> boxes float32 [M, 4], box_phrase int32 [M, P],
                             box_phrase_id uint32 [M], box_score float32 [M],
                             box_valid bool [M]

A record without a label gives zeros, so that sources with different labels mix
in one batch. What an op leaves out of a label it counts in the record's
`dropped`.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mtv_jax.config.op_strings import build_op, parse_ops
from mtv_jax.data import canvas as canvas_lib
from mtv_jax.data.labels import label_values
from mtv_jax.data.records import BadRecord, Record
from mtv_jax.data.tokenizers import Tokenizer
from mtv_jax.utils.errors import did_you_mean


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of the batch: what a row of it looks like."""

  shape: tuple[int, ...]
  dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Step:
  """An op with its arguments bound.

  Attributes:
    apply: (record, generator) -> record; may change the record it is given.
    makes: fields of the batch that it makes.
    labels: fields of the record that it needs, of one source at least: it
      would make nothing but zeros otherwise.
  """

  apply: Callable[[Record, np.random.Generator], Record]
  makes: Mapping[str, Field] = dataclasses.field(default_factory=dict)
  labels: frozenset[str] = frozenset()


class Ops:
  """All ops of a config, one after the other.

  Attributes:
    fields: of the batch, each with its row's shape and dtype.
    labels: fields of records that it needs, of one source at least.
  """

  def __init__(
    self,
    text: str,
    steps: Mapping[str, Step],
    tokenizer: Tokenizer | None,
    wanted: frozenset[str] | None,
  ):
    self._text = text
    self._wanted = wanted
    self._steps = {
      name: (step, zlib.crc32(name.encode())) for name, step in steps.items()
    }
    self._tokenizer = tokenizer
    self.fields = {
      k: v for step in steps.values() for k, v in step.makes.items()
    }
    self.labels = frozenset().union(*(step.labels for step in steps.values()))

  def __call__(self, record: Record, rng: np.random.Generator) -> Record:
    """The record with every field of `fields`.

    Raises:
      BadRecord: a record that can't be used.
    """
    seed = int(rng.integers(2**63))
    for name, (step, number) in self._steps.items():
      # What an op draws does not depend on which others there are.
      own = np.random.default_rng((seed, number)) if name in _DRAWING else rng
      record = step.apply(record, own)
    return record

  def __reduce__(self) -> tuple:
    # Worker processes build the ops again: the steps are closures.
    build = functools.partial(
      build_ops, tokenizer=self._tokenizer, wanted=self._wanted
    )
    return build, (self._text,)

  def __repr__(self) -> str:
    return f"Ops({self._text!r})"


def build_ops(
  text: str,
  *,
  tokenizer: Tokenizer | None = None,
  wanted: Collection[str] | None = None,
) -> Ops:
  """The ops that `text` names.

  Args:
    text: such as "decode|canvas(384)|caption(64, pick='first')".
    tokenizer: what `caption` and `regions` encode with.
    wanted: fields of the batch that somebody reads; an op that makes others
      only is left out. None for all.

  Raises:
    ConfigError: bad syntax, an unknown op or arguments that don't fit.
    ValueError: no op makes a field of the batch, or a value is out of range.
  """
  wanted = None if wanted is None else frozenset(wanted)
  registry = {
    name: functools.partial(factory, tokenizer)
    if factory in _WITH_TOKENIZER
    else factory
    for name, factory in OPS.items()
  }
  # Left out by name, so that what is not read need not even be buildable.
  steps = {
    op.name: build_op(op, registry, "data op")
    for op in parse_ops(text, unique=True)
    if wanted is None or not _OPTIONAL.get(op.name, wanted).isdisjoint(wanted)
  }
  ops = Ops(text, steps, tokenizer, wanted)
  if not ops.fields:
    raise ValueError(
      f"data.ops={text!r} makes no field of the batch; write for example"
      " 'decode|canvas(224)|caption(64)'."
    )
  return ops


def _decode(max_pixels: int = canvas_lib.MAX_PIXELS) -> Step:
  """Bytes to RGB; images that are arrays already are brought to RGB."""

  def apply(record: Record, rng: np.random.Generator) -> Record:
    image, key = _get(record, "image"), record["key"]
    if isinstance(image, np.ndarray):
      record["image"] = _as_rgb(image, key)
    else:
      record["image"] = canvas_lib.decode(image, key=key, max_pixels=max_pixels)
    return record

  return Step(apply)


def _canvas(size: int) -> Step:
  """The whole image squashed to a square; its size stays beside it."""
  _at_least_one("canvas", "size", size)

  def apply(record: Record, rng: np.random.Generator) -> Record:
    image = _get(record, "image")
    if not isinstance(image, np.ndarray):
      raise TypeError(
        f"canvas({size}) got the image as {type(image).__name__}; put `decode`"
        " before it in data.ops."
      )
    record["image_size"] = np.array(image.shape[:2], np.int32)
    record["image"] = canvas_lib.squash(image, size)
    return record

  return Step(
    apply,
    {
      "image": Field((size, size, 3), np.dtype(np.uint8)),
      "image_size": Field((2,), np.dtype(np.int32)),
    },
  )


def _caption(
  tokenizer: Tokenizer | None, length: int, pick: str = "random"
) -> Step:
  """One of the record's captions as ids.

  Of a blank caption (also one that cleaning leaves blank), the next one. A
  record whose captions are all blank is a bad record. One without captions,
  as sources of images alone give them, is a row of padding with
  `caption_valid` False.
  """
  _at_least_one("caption", "length", length)
  _one_of("caption", pick, ("random", "first"))
  _need(tokenizer, "caption")

  def apply(record: Record, rng: np.random.Generator) -> Record:
    captions = record.get("captions") or []
    # Drawn also where there is nothing to choose: what an op after this one
    # draws then does not depend on how many captions a record has.
    start = int(rng.integers(max(len(captions), 1))) if pick == "random" else 0
    for text in [*captions[start:], *captions[:start]]:
      if tokenizer.cleaned(text).strip():
        record["caption"] = _tokens(tokenizer, text, length, record["key"])
        record["caption_valid"] = np.bool_(True)
        return record
    if captions:
      raise BadRecord(
        record["key"], f"all of its captions are empty: {captions[:3]!r}"
      )
    record["caption"] = np.full(length, tokenizer.pad_id, np.int32)
    record["caption_valid"] = np.bool_(False)
    return record

  return Step(
    apply,
    {
      "caption": Field((length,), np.dtype(np.int32)),
      "caption_valid": Field((), np.dtype(np.bool_)),
    },
  )


def _depth(size: int, min_valid: int = label_values.MIN_VALID) -> Step:
  """Inverse depth: 1 to 65535 from its least to its greatest, 0 for none.

  A label of this size is taken as it is. Others, and what a source gives as
  floats, are resampled and scaled anew; see `label_values.make_depth`.
  """
  _at_least_one("depth", "size", size)
  _at_least_one("depth", "min_valid", min_valid)

  def apply(record: Record, rng: np.random.Generator) -> Record:
    depth = record.get("depth")
    stored = depth is not None and depth.dtype == np.uint16
    if depth is None or (stored and depth.shape == (size, size)):
      if depth is None:
        record["depth"] = np.zeros((size, size), np.uint16)
      return record
    made = label_values.make_depth(
      depth.astype(np.float32) if stored else depth,
      side=size,
      valid=depth > 0 if stored else None,
      min_valid=min_valid,
    )
    _count(record, made.counts)
    record["depth"] = (
      made.label.values if made.label else np.zeros((size, size), np.uint16)
    )
    return record

  return Step(
    apply,
    {"depth": Field((size, size), np.dtype(np.uint16))},
    labels=frozenset(["depth"]),
  )


def _regions(
  tokenizer: Tokenizer | None,
  count: int,
  phrase_length: int = 16,
  pick: str = "random",
) -> Step:
  """At most `count` boxes with the ids of their phrases.

  Of more, a random choice or those of the highest scores. Boxes that can't be
  used (see `label_values.make_boxes`) are left out, and so are those whose
  phrase has no tokens.
  """
  _at_least_one("regions", "count", count)
  _at_least_one("regions", "phrase_length", phrase_length)
  if phrase_length < 2:
    raise ValueError(
      f"regions(phrase_length={phrase_length}): the end of a text takes one"
      " place; expected at least 2."
    )
  _one_of("regions", pick, ("random", "score"))
  tokenizer = _need(tokenizer, "regions")
  # An empty text is an end and padding; so is one that cleaning empties.
  blank = tokenizer.encode([""], phrase_length)[0]

  def apply(record: Record, rng: np.random.Generator) -> Record:
    # Drawn also where there is nothing to choose: what an op after this one
    # draws then does not depend on how many boxes a record has.
    seed = int(rng.integers(2**63))
    label = _boxes_of(record)
    scores = label.scores
    if pick == "score":
      order = np.argsort(-scores, kind="stable")
    else:
      # Also where all fit: an objective may take only the first of them.
      order = np.random.default_rng(seed).permutation(len(scores))
    row = {
      "boxes": np.zeros((count, 4), np.float32),
      "box_phrase": np.zeros((count, phrase_length), np.int32),
      "box_phrase_id": np.zeros(count, np.uint32),
      "box_score": np.zeros(count, np.float32),
      "box_valid": np.zeros(count, np.bool_),
    }
    at = 0
    for box in order:
      if at == count:
        break
      phrase = label.phrases[box]
      ids = _tokens(tokenizer, phrase, phrase_length, record["key"])
      if (ids == blank).all():
        _count(record, {"boxes: a phrase of no tokens": 1})
        continue
      row["boxes"][at] = label.boxes[box]
      row["box_phrase"][at] = ids
      row["box_phrase_id"][at] = label_values.phrase_id(phrase)
      row["box_score"][at] = scores[box]
      row["box_valid"][at] = True
      at += 1
    return record | row

  return Step(
    apply,
    {
      "boxes": Field((count, 4), np.dtype(np.float32)),
      "box_phrase": Field((count, phrase_length), np.dtype(np.int32)),
      "box_phrase_id": Field((count,), np.dtype(np.uint32)),
      "box_score": Field((count,), np.dtype(np.float32)),
      "box_valid": Field((count,), np.dtype(np.bool_)),
    },
    labels=frozenset(["boxes", "phrases"]),
  )


def _boxes_of(record: Record) -> label_values.BoxLabel:
  """The usable boxes of a record; none where it has no label."""
  if "boxes" not in record:
    none = np.zeros((0, 4), np.float32)
    return label_values.BoxLabel(none, (), np.zeros(0, np.float32))
  try:
    made = label_values.make_boxes(
      record["boxes"], _get(record, "phrases"), record.get("box_scores")
    )
  except ValueError as error:
    raise BadRecord(record["key"], f"its label has {error}") from error
  _count(record, made.counts)
  return made.label


def _count(record: Record, counts: Mapping[str, int]) -> None:
  dropped = record.setdefault("dropped", {})
  for reason, number in counts.items():
    dropped[reason] = dropped.get(reason, 0) + number


OPS: dict[str, Callable[..., Step]] = {
  "decode": _decode,
  "canvas": _canvas,
  "caption": _caption,
  "depth": _depth,
  "regions": _regions,
}
_WITH_TOKENIZER = (_caption, _regions)
_DRAWING = ("caption", "regions")
# What may be left out, with the fields of the batch that it makes.
_OPTIONAL = {
  "caption": frozenset(["caption", "caption_valid"]),
  "depth": frozenset(["depth"]),
  "regions": frozenset(
    ["boxes", "box_phrase", "box_phrase_id", "box_score", "box_valid"]
  ),
}


def _get(record: Record, field: str) -> Any:
  if field not in record:
    raise KeyError(
      f"record {record['key']!r} has no {field!r}. "
      f"{did_you_mean(field, record)}"
    )
  return record[field]


def _need(tokenizer: Tokenizer | None, op: str) -> Tokenizer:
  if tokenizer is None:
    raise ValueError(
      f"data.ops has `{op}` but the model has no tokenizer: set"
      f" model.text.tokenizer, or leave `{op}` out of data.ops."
    )
  return tokenizer


def _tokens(
  tokenizer: Tokenizer, text: str, length: int, key: str
) -> np.ndarray:
  try:
    return tokenizer.encode([text], length)[0]
  except UnicodeError as error:
    raise BadRecord(key, f"the text {text!r} is not Unicode ({error})") from (
      error
    )


def _one_of(op: str, pick: str, picks: tuple[str, ...]) -> None:
  if pick not in picks:
    raise ValueError(
      f"{op}(pick={pick!r}) is unknown. {did_you_mean(pick, picks)}"
    )


def _at_least_one(op: str, name: str, value: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"{op}({name}={value!r}): expected a whole number >= 1.")


def _as_rgb(image: np.ndarray, key: str) -> UInt8[np.ndarray, "h w 3"]:
  if image.dtype == np.uint8 and image.size:
    if image.ndim == 3 and image.shape[2] == 3:
      return image
    if image.ndim == 2:
      return np.repeat(image[..., None], 3, axis=2)
    if image.ndim == 3 and image.shape[2] == 1:
      return np.repeat(image, 3, axis=2)
  raise BadRecord(
    key,
    f"the image is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3],"
    " [H, W, 1] or [H, W]",
  )
