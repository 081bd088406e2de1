"""Phrase sources: a detector's queries for each record.

    phrases = build_phrases("ngrams")
    phrases({"key": "7", "captions": ["A dog on the beach"], "meta": {}})
    ['a dog', 'a dog on', 'a dog on the', 'a dog on the beach', 'dog', ...]

A phrase source is named by a string:

  ngrams         n-grams of the record's captions, by OWLv2's rules
  tags           the field `tags` of the record's .json; `tags:FIELD` for FIELD
  FILE           a vocabulary for all records: one phrase per line
  MODULE:NAME    a function from a record to its phrases; label sets store only
                 the name, so rename the function if you change it
"""

import abc
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtv_jax.config import foreign
from mtv_jax.config.options import (
  PositiveInt,
  check_value,
  import_plugin,
  is_plugin,
)
from mtv_jax.data.labels.label_sets import hash_bytes
from mtv_jax.data.records import BadRecord, Record
from mtv_jax.data.tokenizers import canonicalize
from mtv_jax.utils.errors import InputError, did_you_mean

# OWLv2's limits; a caption of 35 words has about 300 10-grams.
MAX_PHRASES = 300
MAX_WORDS = 10

_MIN_PADDED = 8
_NO_PHRASES = "boxes: no phrases to look for"
_SEPARATORS = re.compile(r"[,;|]")

# OWLv2's lists (Minderer et al. 2023): common words of web captions without
# visual content, and NLTK's English stop words, as `canonicalize` spells them.
_GENERIC = """
  alibaba aliexpress amazon available background blog buy co com description
  diy download facebook free gif hd ideas illustration illustrations image
  images img instagram jpg online org original page pdf photo photography
  photos picclick picture pictures png porn premium resolution royalty sale sex
  shutterstock stock svg thumbnail tumblr tumgir twitter uk uploaded vector
  vectors video videos wallpaper wallpapers wholesale www xxx youtube
"""

_STOP = """
  i me my myself we our ours ourselves you youre youve youll youd your yours
  yourself yourselves he him his himself she shes her hers herself it its itself
  they them their theirs themselves what which who whom this that thatll these
  those am is are was were be been being have has had having do does did doing
  a an the and but if or because as until while of at by for with about against
  between into through during before after above below to from up down in out on
  off over under again further then once here there when where why how all any
  both each few more most other some such no nor not only own same so than too
  very s t can will just don dont should shouldve now d ll m o re ve y ain aren
  arent couldn couldnt didn didnt doesn doesnt hadn hadnt hasn hasnt haven
  havent isn isnt ma mightn mightnt mustn mustnt needn neednt shan shant shouldn
  shouldnt wasn wasnt weren werent won wont wouldn wouldnt
"""

GENERIC_WORDS = frozenset(_GENERIC.split())
STOP_WORDS = frozenset(_STOP.split())


class Phrases(abc.ABC):
  """Phrases to look for in a record's image; subclasses are dataclasses."""

  source: str  # Name of the source, for the manifest.
  max_phrases: int = MAX_PHRASES  # Per record.
  # Phrases shared by all records, which are encoded once.
  vocabulary: tuple[str, ...] | None = None

  @property
  def settings(self) -> dict[str, Any]:
    """Everything that determines the phrases (JSON), for a manifest."""
    return {"source": self.source, **dataclasses.asdict(self)}

  @abc.abstractmethod
  def __call__(self, record: Record) -> list[str]:
    """Distinct phrases of a record; raises BadRecord for a non-string."""


def build_phrases(
  source: str, *, max_phrases: int = MAX_PHRASES, max_words: int = MAX_WORDS
) -> Phrases:
  """Builds a phrase source by name (see the top of the file).

  `max_phrases` limits a record's phrases, except for a vocabulary; `max_words`
  limits the words of an n-gram.
  """
  check_value(max_phrases, PositiveInt, "max_phrases")
  check_value(max_words, PositiveInt, "max_words")
  kind, _, field = source.partition(":")
  if source == "ngrams":
    return NGrams(max_phrases, max_words)
  if kind == "tags":
    return Tags(field or "tags", max_phrases)
  if Path(source).expanduser().is_file():
    return _read_vocabulary(source)
  if is_plugin(source):
    return _PluginPhrases(source, max_phrases)
  raise InputError(
    f"phrases={source!r} is neither a phrase source nor a file."
    f" {did_you_mean(source, ['ngrams', 'tags', 'tags:FIELD'])} A file has one"
    " phrase per line; MODULE:NAME names a function of a record."
  )


@dataclasses.dataclass(frozen=True)
class NGrams(Phrases):
  """N-grams of captions (OWLv2, Minderer et al. 2023, appendix).

  Removes generic words, lists n-grams of up to `max_words` words by start, then
  by length, and drops n-grams that consist of stop words.

  Unlike the paper, removes punctuation first, so that "photo." is generic, and
  drops repeated n-grams.
  """

  source = "ngrams"
  max_phrases: int = MAX_PHRASES
  max_words: int = MAX_WORDS

  def __call__(self, record: Record) -> list[str]:
    captions = [canonicalize(caption).split() for caption in record["captions"]]
    ngrams = (
      words[start : end + 1]
      for caption in captions
      if (words := [word for word in caption if word not in GENERIC_WORDS])
      for start in range(len(words))
      for end in range(start, min(start + self.max_words, len(words)))
    )
    phrases = (" ".join(n) for n in ngrams if not STOP_WORDS.issuperset(n))
    return _select_distinct(phrases, self.max_phrases)


@dataclasses.dataclass(frozen=True)
class Tags(Phrases):
  """A field of the record's .json: a list, or a string with `,`, `;` or `|`.

  Among tags that differ only in case or punctuation, uses the first spelling.
  Records without the field, or with null, yield nothing.
  """

  source = "tags"
  field: str
  max_phrases: int = MAX_PHRASES

  def __call__(self, record: Record) -> list[str]:
    tags = record["meta"].get(self.field)
    if tags is None:
      return []
    if isinstance(tags, str):
      tags = _SEPARATORS.split(tags)
    tags = _check_strings(record, tags, f"its {self.field!r}")
    return _select_distinct(tags, self.max_phrases)


def _read_vocabulary(file: str) -> "FixedPhrases":
  """Reads the phrases of a file; drops blank and repeated lines."""
  path = Path(file).expanduser()
  lines = foreign.read_text(path).splitlines()
  nonblank = [line for line in lines if canonicalize(line)]
  phrases = _select_distinct(nonblank, len(nonblank))
  if not phrases:
    raise InputError(f"{file} has {len(lines)} lines but no phrase.")
  if len(phrases) < len(lines):
    logging.info(
      f"{file}: {len(phrases)} phrases; dropped {len(lines) - len(nonblank)}"
      f" blank lines and {len(nonblank) - len(phrases)} repeated ones"
    )
  return FixedPhrases(tuple(phrases), path.name)


@dataclasses.dataclass(frozen=True)
class FixedPhrases(Phrases):
  """A vocabulary for all records."""

  vocabulary: tuple[str, ...] = ()
  name: str = "vocabulary"

  @property
  def settings(self) -> dict[str, Any]:
    """See base class; the hash depends on the order of phrases."""
    return {
      "source": "vocabulary",
      "file": self.name,
      "phrases": len(self.vocabulary),
      "hash": hash_phrases(self.vocabulary),
    }

  def __call__(self, record: Record) -> list[str]:
    del record
    return list(self.vocabulary)


@dataclasses.dataclass(frozen=True)
class _PluginPhrases(Phrases):
  """The plug-in `MODULE:NAME`, a function from a record to its phrases."""

  source: str
  max_phrases: int

  def __post_init__(self):
    _ = self._function

  @functools.cached_property
  def _function(self) -> Callable[[Record], Iterable[str]]:
    function = import_plugin(self.source, "phrases")
    if not callable(function):
      raise InputError(f"phrases={self.source!r} is not a function.")
    return function

  def __call__(self, record: Record) -> list[str]:
    phrases = _check_strings(record, self._function(record), self.source)
    return _select_distinct(phrases, self.max_phrases)


def require_phrases(phrases: Phrases, record: Record) -> tuple[str, ...]:
  """The phrases of a record; raises BadRecord if there are none."""
  if not (record_phrases := tuple(phrases(record))):
    raise BadRecord(str(record["key"]), _NO_PHRASES)
  return record_phrases


def pad_count(count: int) -> int:
  """Rounds up to a power of two, at least 8, to compile few programs."""
  return max(_MIN_PADDED, 1 << (count - 1).bit_length())


def hash_phrases(phrases: Sequence[str]) -> str:
  """64-bit hexadecimal hash of an ordered list of phrases."""
  return hash_bytes("\n".join(phrases).encode())


def _check_strings(record: Record, value: Any, name: str) -> list[str]:
  if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
    value = [value]
  items = list(value)
  for item in items:
    if not isinstance(item, str):
      # Reports only the type, so that equal errors are counted together.
      raise BadRecord(
        str(record["key"]),
        f"phrases: {name} has a {type(item).__name__}, but expected strings",
      )
  return items


def _select_distinct(phrases: Iterable[str], limit: int) -> list[str]:
  """The first `limit` distinct phrases, ignoring case and punctuation.

  Spaces are normalized. Lone surrogates (from a truncated JSON string) become
  question marks.
  """
  distinct: dict[str, str] = {}
  for phrase in phrases:
    if len(distinct) >= limit:
      break
    phrase = phrase.encode("utf-8", "replace").decode()
    if canonical := canonicalize(phrase):
      distinct.setdefault(canonical, " ".join(phrase.split()))
  return list(distinct.values())
