"""Hostile captions and JSON, through the whole input pipeline."""

import json
import time

import numpy as np
from hostile.harness import Cases
from hostile.samples import JPEG, read_epoch, read_record, read_tar, record

from mtv_jax.data import records
from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.base import Source
from mtv_jax.data.stats import CorruptDataError
from mtv_jax.data.tokenizers import ByteTokenizer
from mtv_jax.data.tokenizers.words import SceneWordTokenizer

CAPTIONS = Cases(__file__, "captions and their JSON")
CONTENT = Cases(__file__, "content or storage")


def _add(name, expects="skip", match="h: ", **fields):
  CAPTIONS.add(
    name,
    lambda folder: read_record(folder, **fields),
    expects=expects,
    match=match if expects == "skip" else "",
  )


_DEEP = b"[" * 1000 + b"]" * 1000
_VERY_DEEP = b"[" * 1_000_000
for _name, _json in {
  "empty": b"",
  "not JSON": b"{caption: a dog}",
  "cut": b'{"caption": "a d',
  "a list": b"[]",
  "a text": b'"a dog"',
  "a number": b"3",
  "null": b"null",
  "without captions": b'{"url": "x"}',
  "caption is a number": b'{"caption": 3}',
  "caption is a list": b'{"caption": ["a dog"]}',
  "caption is null": b'{"caption": null}',
  "caption is an object": b'{"caption": {"en": "a dog"}}',
  "captions is an object": b'{"captions": {"en": "a dog"}}',
  "captions is empty": b'{"captions": []}',
  "captions is of null": b'{"captions": [null]}',
  "captions is of lists": b'{"captions": [["a dog"]]}',
  "captions is of numbers": b'{"captions": [1, 2]}',
  "captions is true": b'{"captions": true}',
  "caption is blank": b'{"caption": " \\t\\n"}',
  "captions are blank": b'{"captions": ["", " "]}',
  "nested a thousand deep": b'{"caption": ' + _DEEP + b"}",
  "nested a million deep": _VERY_DEEP,
  "objects a million deep": b'{"captions":' * 100_000,
  "nested captions": b'{"captions": [' + _DEEP[:900] + b"x",
  "latin-1": '{"caption": "Stra\u00dfe"}'.encode("latin-1"),
  "UTF-16 cut": '{"caption": "a dog"}'.encode("utf-16")[:-3],
  "NUL bytes": bytes(100),
  "a number of 5,000 digits": b'{"caption": ' + b"9" * 5000 + b"}",
  "NaN": b'{"caption": NaN}',
  "infinity": b'{"captions": [1e999]}',
  "a JPEG": JPEG,
  "names of lone surrogates": b'{"\\ud800": 1, "\\udfff": 2}',
  "100,000 names": json.dumps({f"k{i}": i for i in range(100_000)}).encode(),
  "a name of 1 MB": json.dumps({"k" * 1_000_000: 1}).encode(),
  "random bytes": np.random.default_rng(0).bytes(4000),
}.items():
  _add(f"JSON, {_name}", text=None, json=_json)

for _name, (_text, _expects) in {
  "empty": (b"", "skip"),
  "blank": (b" \n\t\xc2\xa0", "skip"),
  "a byte-order mark alone": (b"\xef\xbb\xbf", "skip"),
  "latin-1": ("Stra\u00dfe".encode("latin-1"), "skip"),
  "UTF-16": ("a dog\u0100".encode("utf-16"), "skip"),
  "cut in a character": ("a dog \u65e5".encode()[:-1], "skip"),
  "an encoded lone surrogate": (b"a \xed\xa0\x80 dog", "skip"),
  "NUL bytes": (b"a\0dog", "used"),
  "controls": (bytes(range(1, 32)), "used"),
  "direction marks": ("\u202ea dog\u202c\u200f".encode(), "used"),
  "5,000 combining marks": (("e" + "\u0301" * 5000).encode(), "used"),
  "99,000 characters": (b"dog " * 24_750, "used"),
  "1 MB": (b"dog " * 250_000, "skip"),
  "8 MB of one word": (b"x" * (8 << 20), "skip"),
  "17 MB": (b"x" * (17 << 20), "skip"),
  "a JPEG": (JPEG, "skip"),
}.items():
  _add(f"text, {_name}", _expects, text=_text)

_LONE = {
  "high": "a \ud800 dog",
  "low": "\udfff",
  "reversed pair": "\udc00\ud800",
  "at the end": "a dog" + "\udbff" * 3,
}
for _name, _text in _LONE.items():
  _add(f"a lone surrogate, {_name}", text=None, json={"caption": _text})
  _add(f"one of two captions, {_name}", text="x", json={"captions": [_text]})


@CAPTIONS.add("200 keys with lone surrogates in their names", expects="used")
def _names(folder):
  members = {}
  for i in range(200):
    members |= record(f"k\udc80{i}")
  return read_tar(folder, members, tokenizer="words")


@CAPTIONS.add("half of a thousand captions", expects="skip", match="500")
def _half(folder):
  members = {}
  for i in range(1000):
    bad = {"text": None, "json": {"caption": "\ud800"}}
    members |= record(f"k{i:04d}", **(bad if i % 2 else {"text": "a dog"}))
  outcome, reasons = read_tar(folder, members)
  return outcome, f"{reasons.count('not Unicode')} {reasons[:200]}"


class _Records(Source):
  """Good records; the function `read` is called for record 1."""

  name, fields = "r", frozenset(["key", "image", "captions"])

  def __init__(self, read):
    self.shards = np.array([3])
    self._read = read

  def __getitem__(self, i):
    if i.__index__() == 1:
      self._read()
    return {"key": str(i), "image": JPEG, "captions": ["a dog"]}


class _Failing(ByteTokenizer):
  """Raises an error for the text "bad"."""

  def __init__(self, error):
    super().__init__(None, "none")
    self._error = error

  def _ids(self, text, length):
    if text == "bad":
      raise self._error
    return super()._ids(text, length)


class PanicException(BaseException):
  """Derives from BaseException, as that of pyo3 does."""


for _name, _error in {
  "a panic": PanicException("index out of bounds"),
  "a recursion": RecursionError("maximum recursion depth exceeded"),
  "a lookup": KeyError("k"),
  "a type": TypeError("TextEncodeInput must be Union[...]"),
  "an assertion": AssertionError(),
  "an overflow": OverflowError("int too large"),
  "a message that can't be printed": ValueError("\ud800" * 10),
  "a message of 1 MB": ValueError("x" * 1_000_000),
  "a stop of an iteration": StopIteration(),
  "a runtime error of C++": RuntimeError("Internal: unk is not defined."),
  "an OSError without a number": OSError("decoder error -2"),
}.items():

  def _tokenize(folder, error=_error):
    return read_record(folder, text="bad", tokenizer=_Failing(error))

  CONTENT.add(f"a tokenizer raises {_name}", _tokenize, expects="skip")


def _passes(name, error, where):
  """The error must end the run: it is not about a record's content."""

  def run(folder):
    def fail():
      raise error

    try:
      if where == "tokenizer":
        read_record(folder, text="bad", tokenizer=_Failing(error))
      else:
        read_epoch(_Records(fail))
    except type(error) as caught:
      return "error", f"{type(caught).__name__} passes: {error}"
    return "skip", "it was counted as a bad record"

  CONTENT.add(name, run, expects="error")


_passes("memory is short in a tokenizer", MemoryError(), "tokenizer")
_passes("the disk fails in a tokenizer", OSError(5, "I/O error"), "tokenizer")
_passes("memory is short in a source", MemoryError(), "source")
_passes("the disk fails in a source", OSError(5, "I/O error"), "source")
_passes("too many open files", OSError(24, "Too many open files"), "source")
_passes("a source's own error", RuntimeError("HTTP 503"), "source")
_passes("a timeout of storage", TimeoutError(110, "timed out"), "source")


@CONTENT.add("a config mistake fails each record", match="put `decode` before")
def _mistake(folder):
  loader = make_loader(
    {"ops": "canvas(8)"},
    batch_size=2,
    seed=0,
    sources=[_Records(lambda: None)],
  )
  # Three records are quickly tried.
  start = time.monotonic()
  with loader:
    try:
      next(loader)
    except CorruptDataError:
      assert time.monotonic() - start < 5
      raise


@CONTENT.add("a caption without words", expects="used")
def _unknown(folder):
  tokenizer = SceneWordTokenizer(None, "lower")
  return read_record(folder, text="???", tokenizer=tokenizer)


for _name, _data in {
  "empty": b"",
  "another magic": b"PK\x03\x04" + bytes(60),
  "counts alone": b"MTV1" + b"\xff" * 4,
  "absurd counts": b"MTV1" + b"\xff" * 400,
  "negative sizes": b"MTV1" + b"\x00" * 4 + b"\xff" * 8,
  "a key that is not UTF-8": (
    b"MTV1\0\0\0\0" + (1).to_bytes(4, "little") + bytes(4) + b"\xff"
  ),
  "a caption that is not UTF-8": records.encode(
    {"key": "k", "image": b"x", "captions": ["\u00ff\u00ff"]}
  )[:-2]
  + b"\xff\xff",
  "a byte too many": records.encode(
    {"key": "k", "image": b"x", "captions": ["a"]}
  )
  + b"\0",
}.items():
  CONTENT.add(
    f"an encoded record, {_name}",
    lambda folder, data=_data: records.decode(data, where="x:1"),
    expects="skip",
    match="x:1",
  )


@CONTENT.add("a key of 1 MB", expects="skip")
def _long_key(folder):
  raise BadRecord("k" * 1_000_000, "is bad")


@CAPTIONS.parametrize
def test_captions(case, hostile):
  hostile(case)


@CONTENT.parametrize
def test_content_or_storage(case, hostile):
  hostile(case)
