"""Host ops that read labels: depth maps, boxes with phrases, features."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int32

from mtv_jax.config.feature_layout import FeatureLayout, field_name
from mtv_jax.config.options import Fraction, PositiveInt, Range, Side
from mtv_jax.data.labels import label_values
from mtv_jax.data.ops import Field, HostOp, TextOp, get_field
from mtv_jax.data.records import (
  BadRecord,
  Record,
  count_dropped,
  count_text,
)
from mtv_jax.data.tokenizers.base import Tokenizer
from mtv_jax.utils.errors import InputError


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
    slot = 0
    for box in order[label.scores[order] >= self.min_score]:
      if slot == self.count:
        break
      phrase = label.phrases[box]
      self._check_length(phrase, record["key"])
      ids, is_cut, phrase_id = _encode_phrase(
        self.tokenizer, phrase, self.phrase_length
      )
      if ids is None:
        count_dropped(record, {"boxes: a phrase of no tokens": 1})
        continue
      has_unknown = self.tokenizer.has_unknown(ids)
      count_text(record, "phrases", is_cut, has_unknown)
      row["boxes"][slot] = label.boxes[box]
      row["box_phrase"][slot] = ids
      row["box_phrase_id"][slot] = phrase_id
      row["box_score"][slot] = label.scores[box]
      row["box_valid"][slot] = True
      slot += 1
    return record | row


@dataclasses.dataclass(frozen=True)
class FeaturesOp(HostOp):
  """Teacher features read from label sets, quantized to 8 bits."""

  layouts: Mapping[str, FeatureLayout] = dataclasses.field(
    default_factory=dict, kw_only=True
  )

  is_optional = True
  run_arguments = ("layouts",)
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


@functools.lru_cache(maxsize=1 << 14)
def _encode_phrase(
  tokenizer: Tokenizer, phrase: str, length: int
) -> tuple[Int32[np.ndarray, " length"] | None, bool, int]:
  """Returns ids (None if blank), whether they were cut, and the phrase's id."""
  ids, is_cut = tokenizer.encode_text(phrase, length)
  blank_ids, _ = tokenizer.encode_text("", length)
  ids = None if (ids == blank_ids).all() else ids
  return ids, is_cut, label_values.phrase_id(phrase)


def _make_box_label(record: Record) -> label_values.BoxLabel:
  """Returns the usable boxes of a record; may be empty."""
  if "boxes" not in record:
    boxes, scores = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    return label_values.BoxLabel(boxes, (), scores)
  try:
    outcome = label_values.make_boxes(
      record["boxes"], get_field(record, "phrases"), record.get("box_scores")
    )
  except ValueError as error:
    raise BadRecord(record["key"], f"its label has {error}") from error
  count_dropped(record, outcome.counts)
  return outcome.label
