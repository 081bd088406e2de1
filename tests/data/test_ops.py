"""Host ops on small records."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from mtv_jax.config.options import PositiveInt
from mtv_jax.data import ops as ops_lib
from mtv_jax.data.ops import HostOp, build_ops, phrase_length
from mtv_jax.data.records import BadRecord
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.data.tokenizers.builtin import ByteTokenizer
from mtv_jax.utils.errors import ConfigError


def png(pixels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()


def rng(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def tokenizer():
  return build_tokenizer("bytes", clean="lower")


@pytest.fixture
def record():
  pixels = rng().integers(0, 256, (20, 30, 3), np.uint8)
  return {"key": "k7", "image": png(pixels), "captions": ["A dog", "Two cats"]}


def text(row: np.ndarray) -> str:
  return bytes(int(i) - 2 for i in row if i > 1).decode()


def test_row_has_shapes_and_dtypes_of_fields(record, tokenizer):
  ops = build_ops("decode|canvas(8)|caption(16)", tokenizer=tokenizer)
  row = ops(record, rng())
  assert {k: (f.shape, f.dtype) for k, f in ops.fields.items()} == {
    "image": ((8, 8, 3), np.uint8),
    "image_size": ((2,), np.int32),
    "caption": ((16,), np.int32),
    "caption_valid": ((), np.bool_),
  }
  for name, field in ops.fields.items():
    assert row[name].shape == field.shape
    assert row[name].dtype == field.dtype
  assert row["image_size"].tolist() == [20, 30]
  assert row["caption_valid"]


def test_pixels_need_no_decoding_and_grey_becomes_rgb():
  ops = build_ops("decode|canvas(4)")
  grey = np.full((4, 4), 9, np.uint8)
  for image in (grey, grey[..., None], np.repeat(grey[..., None], 3, -1)):
    row = ops({"key": "k", "image": image}, rng())
    assert row["image"].shape == (4, 4, 3)
    assert (row["image"] == 9).all()
  for image in (grey.astype(np.float32), np.zeros((4, 4, 4), np.uint8)):
    with pytest.raises(BadRecord, match=r"expected uint8 \[H, W, 3\]"):
      ops({"key": "k", "image": image}, rng())


def test_captions_are_picked_evenly_and_by_the_generator(tokenizer):
  ops = build_ops("caption(8)", tokenizer=tokenizer)
  captions = ["one", "two", "three"]

  def pick(seed: int) -> str:
    record = {"key": "k", "captions": list(captions)}
    return text(ops(record, rng(seed))["caption"])

  picks = [pick(seed) for seed in range(600)]
  assert picks[:20] == [pick(seed) for seed in range(20)]
  counts = [picks.count(caption) for caption in captions]
  assert sum(counts) == 600
  assert min(counts) > 160


def test_first_caption(tokenizer):
  ops = build_ops("caption(8, pick='first')", tokenizer=tokenizer)
  for seed in range(5):
    row = ops({"key": "k", "captions": ["A", "B"]}, rng(seed))
    assert text(row["caption"]) == "a"


def test_blank_captions_are_skipped():
  tokenizer = build_tokenizer("bytes", clean="canonicalize")
  ops = build_ops("caption(8)", tokenizer=tokenizer)
  for seed in range(8):
    row = ops({"key": "k", "captions": ["", " \n", "!?", "dog"]}, rng(seed))
    assert text(row["caption"]) == "dog"
    assert row["caption_valid"]


def test_captions_and_phrases_are_tokenized_once():
  texts = []

  class Counting(ByteTokenizer):
    def _tokenize(self, text, length):
      texts.append(text)
      return super()._tokenize(text, length)

  ops = build_ops("caption(8)|regions(4)", tokenizer=Counting(None, "lower"))
  labels = {"boxes": np.tile(np.float32([0, 0, 1, 1]), (3, 1))}
  labels["phrases"] = ["a cat", "a cat", "a hat"]
  for seed in range(2):
    row = ops({"key": "k", "captions": ["!", "a dog"]} | labels, rng(seed))
    assert len(set(row["box_phrase_id"][row["box_valid"]])) == 2
  captions = [text for text in texts if text in ("!", "a dog")]
  assert len(captions) == 2  # One of each record.
  phrases = [text for text in texts if text in labels["phrases"]]
  assert sorted(phrases) == ["a cat", "a hat"]


@pytest.mark.parametrize("record", [{"key": "k"}, {"key": "k", "captions": []}])
def test_no_captions_are_padding(record, tokenizer):
  ops = build_ops("caption(4)", tokenizer=tokenizer)
  row = ops(record, rng())
  assert row["caption"].tolist() == [0, 0, 0, 0]
  assert not row["caption_valid"]


@pytest.mark.parametrize(
  ("ops", "fields", "message"),
  [
    ("caption(8)", {"captions": [""]}, "'k9'.*captions are empty"),
    ("caption(8)", {"captions": ["  ", "\t"]}, "'k9'.*captions are empty"),
    ("caption(8)", {"captions": ["a \ud800"]}, "UnicodeEncodeError"),
    ("decode|canvas(8)", {"image": b"nothing"}, "'k9'"),
    ("canvas(8)", {"image": b"nothing"}, "put `decode` before"),
    ("decode|canvas(8)", {"img": b""}, "`decode` .*KeyError.*'image'"),
  ],
)
def test_bad_records_name_the_key(ops, fields, message, tokenizer):
  with pytest.raises(BadRecord, match=message):
    build_ops(ops, tokenizer=tokenizer)({"key": "k9"} | fields, rng())


@pytest.mark.parametrize(
  ("ops", "error", "match"),
  [
    ("decode|canvass(8)", ConfigError, "Did you mean 'canvas'"),
    ("decode|canvas", ConfigError, "size"),
    ("decode|canvas(8, 9)", ConfigError, "size"),
    ("decode|canvas(0)", ConfigError, "size is 0, expected an integer >= 1"),
    ("caption(8, pick='fisrt')", ValueError, "Did you mean 'first'"),
    ("caption(8, pick='random', tokenizer=1)", ConfigError, "expected a Token"),
    ("decode|canvas(8)|canvas(4)", ConfigError, "canvas"),
    ("decode(canvas_size=4)|canvas(8)", ConfigError, "canvas_size"),
    ("decode", ValueError, "no field"),
    ("decode|canvas(", ConfigError, "character"),
    ("regions(0)", ConfigError, "count is 0, expected an integer >= 1"),
    ("regions(4, phrase_length=0)", ConfigError, "phrase_length is 0"),
    ("regions(4, phrase_length=1)", ConfigError, "is 1, expected .* >= 2"),
    ("regions(4, pick='best')", ValueError, "pick is 'best'.*random, score"),
    ("depth(0)", ConfigError, "size is 0"),
    ("depth(8, min_valid=0)", ConfigError, "min_valid is 0"),
    ("region(4)", ConfigError, "Did you mean 'regions'"),
  ],
)
def test_invalid_config_is_rejected(ops, error, match, tokenizer):
  with pytest.raises(error, match=match):
    build_ops(ops, tokenizer=tokenizer)


@pytest.mark.parametrize("op", ["caption", "regions"])
def test_text_ops_without_a_tokenizer(op):
  with pytest.raises(ValueError, match=f"`{op}` but.* model.text.tokenizer"):
    build_ops(f"decode|canvas(8)|{op}(8)")


@pytest.mark.parametrize(
  ("text", "length"),
  [
    ("decode|canvas(8)|regions(2, phrase_length=6)", 6),
    ("decode|canvas(8)|regions(2, 9)", 9),
    ("regions(2)", 16),
    ("decode|canvas(8)", None),
  ],
)
def test_phrase_length_of_ops(text, length):
  assert phrase_length(text) == length


@dataclasses.dataclass(frozen=True)
class Noise(HostOp):
  """A random op that adds a field."""

  size: PositiveInt
  random = True
  is_optional = True
  batch_fields = {"noise": (("size",), np.float64)}

  def __call__(self, record, rng):
    return record | {"noise": rng.random(self.size)}


def test_random_op_is_independent_and_skipped_if_unread(monkeypatch):
  monkeypatch.setattr(ops_lib, "OPS", {**ops_lib.OPS, "noise": Noise})
  record = {"key": "k", "image": np.zeros((4, 4, 3), np.uint8)}
  alone = build_ops("noise(3)")(dict(record), rng())["noise"]
  with_canvas = build_ops("canvas(2)|noise(3)")(dict(record), rng())["noise"]
  np.testing.assert_array_equal(alone, with_canvas)
  assert not np.array_equal(
    alone, build_ops("noise(3)")(dict(record), rng(1))["noise"]
  )
  ops = build_ops("canvas(2)|noise(3)", batch_fields=["image"])
  assert set(ops.fields) == {"image", "image_size"}
  ops = build_ops("canvas(2)|noise(3)", batch_fields=["noise"])
  assert set(ops.fields) == {"image", "image_size", "noise"}


@pytest.mark.parametrize("name", ops_lib.OPS)
def test_shapes_of_batch_fields_name_arguments(name, tokenizer):
  op = ops_lib.OPS[name]
  given = issubclass(op, ops_lib.TextOp)
  sizes = (4,) if op.batch_fields else ()
  built = op(*sizes, **({"tokenizer": tokenizer} if given else {}))
  assert built.fields.keys() == op.batch_fields.keys()
  for field in built.fields.values():
    assert all(isinstance(n, int) for n in field.shape)
