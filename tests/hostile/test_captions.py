"""Hostile captions and JSON, through the whole input pipeline."""

import time

import numpy as np
from hostile.harness import Cases, run_all
from hostile.samples import (
  BROKEN_JSON,
  JPEG,
  by_repr,
  changed,
  other_types,
  read_epoch,
  read_record,
  read_tar,
  record,
)

from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.base import Source
from mtv_jax.data.stats import CorruptDataError
from mtv_jax.data.tokenizers.builtin import ByteTokenizer, SceneWordTokenizer

CAPTIONS = Cases(__file__, "captions and their JSON")
CONTENT = Cases(__file__, "content or storage")


def _read_json(folder, content):
  return read_record(folder, text=None, json=content)


def _read_text(folder, content):
  return read_record(folder, text=content)


_DEEP = b"[" * 1000 + b"]" * 1000
_LONE = ["a \ud800 dog", "\udfff", "a dog" + "\udbff" * 3]
_wrong = [{"en": "a dog"}, [], [None], [["a dog"]], [1, 2], True, ["", " "]]
_fields = {"url": ["x"], "caption": [*other_types("a dog"), " \t\n", *_LONE]}
_fields["captions"] = [*_wrong, *([text] for text in _LONE)]
_files = {
  "nested a thousand deep": b'{"caption": ' + _DEEP + b"}",
  "not UTF-8": '{"caption": "Stra\u00dfe"}'.encode("latin-1"),
  "NaN": b'{"caption": NaN}',
  "names of lone surrogates": b'{"\\ud800": 1, "\\udfff": 2}',
  "100,000 names": {f"k{i}": i for i in range(100_000)},
}
_texts = [b"", b"\xef\xbb\xbf", "Stra\u00dfe".encode("latin-1"), JPEG]
_texts += ["a dog\u0100".encode("utf-16"), b"a \xed\xa0\x80 dog"]
_texts = by_repr(_texts) | {"1 MB": b"dog " * 250_000, "17 MB": bytes(17 << 20)}
for _read, _name, _contents in (
  (_read_json, "JSON, ", BROKEN_JSON | changed({}, _fields) | _files),
  (_read_text, "text, ", _texts),
):
  _options = {"prefix": _name, "expects": "skip", "match": "h: "}
  CAPTIONS.add_table(_read, _contents, **_options)
_odd = [b"a\0dog", ("e" + "\u0301" * 5000).encode(), b"dog " * 24_750]
CAPTIONS.add_table(_read_text, by_repr(_odd), prefix="odd ", expects="used")


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
  return outcome, f"{reasons.count('UnicodeEncode')} {reasons[:200]}"


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

  def _tokenize(self, text, length):
    if text == "bad":
      raise self._error
    return super()._tokenize(text, length)


class PanicException(BaseException):
  """Derives from BaseException, like pyo3's."""


def _tokenize(folder, error):
  return read_record(folder, text="bad", tokenizer=_Failing(error))


CONTENT.add_table(
  _tokenize,
  {
    "a panic": PanicException("index out of bounds"),
    "a recursion": RecursionError("maximum recursion depth exceeded"),
    "a runtime error of C++": RuntimeError("Internal: unk is not defined."),
    "an assertion": AssertionError(),
    "a message that can't be printed": ValueError("\ud800" * 10),
    "a message of 1 MB": ValueError("x" * 1_000_000),
    "a stop of an iteration": StopIteration(),
    "an OSError without a number": OSError("decoder error -2"),
  },
  prefix="a tokenizer raises ",
  expects="skip",
)


def _pass_error(folder, error):
  """The error must end the run: it is not about a record's content."""

  def fail():
    raise error

  reads = [lambda: read_epoch(_Records(fail))]
  if not isinstance(error, RuntimeError):
    reads.append(lambda: _tokenize(folder, error))
  for read in reads:
    try:
      read()
    except type(error):
      continue
    return "skip", "it was counted as a bad record"
  return "error", "passes"


CONTENT.add_table(
  _pass_error,
  {
    "memory": MemoryError(),
    "the disk": OSError(5, "I/O error"),
    "a source's own error": RuntimeError("HTTP 503"),
    "a timeout of storage": TimeoutError(110, "timed out"),
  },
  prefix="ends the run, ",
)


@CONTENT.add("a config mistake fails each record", match="put `decode` before")
def _mistake(folder):
  loader = make_loader(
    {"ops": "canvas(8)"}, batch_size=2, seed=0, sources=[_Records(lambda: None)]
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


@CONTENT.add("a key of 1 MB", expects="skip")
def _long_key(folder):
  raise BadRecord("k" * 1_000_000, "is bad")


test_captions = run_all(CAPTIONS, CONTENT)
