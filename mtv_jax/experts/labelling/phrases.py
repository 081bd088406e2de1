"""Phrase sources: the queries of a detector for each record.

    phrases = build_phrases("ngrams")
    phrases({"key": "7", "captions": ["A dog on the beach"], "meta": {}})
    ['a dog', 'a dog on', 'a dog on the', 'a dog on the beach', 'dog', ...]

A source of phrases is named by a string:

  ngrams         runs of words of the record's captions, by OWLv2's rules
  tags           the field `tags` of the record's .json; `tags:FIELD` another
  FILE           a vocabulary: one phrase a line, the same for every record
  MODULE:NAME    a function of a record that gives its phrases; what is kept of
                 it in a label set is its name, so give a changed one a new name
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mtv_jax.data.records import BadRecord, Record
from mtv_jax.data.tokenizers import canonicalize
from mtv_jax.utils.errors import InputError, did_you_mean

# OWLv2's. The 10-grams of a caption of 35 words are about as many; a caption
# of COCO has some 50.
# Why a record without phrases has no boxes.
NOTHING = "boxes: no phrases to look for"
_LEAST = 8
MAX_PHRASES = 300
MAX_WORDS = 10

_SEPARATORS = re.compile(r"[,;|]")
_NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


# Facts of OWLv2's recipe (Minderer et al. 2023): common words beside web images
# that say nothing of their content, and NLTK's English stop words, written as
# `canonicalize` leaves them ("dont").
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


@runtime_checkable
class Phrases(Protocol):
  """Gives the phrases to look for in a record's image.

  Attributes:
    settings: all that decides which they are (JSON), for a manifest.
    vocabulary: what every record is searched for, where that is one closed
      list, which an expert can encode once; None where it differs.
  """

  settings: Mapping[str, Any]
  vocabulary: tuple[str, ...] | None

  def __call__(self, record: Record) -> list[str]:
    """Phrases of a record, each once; none where it has none.

    Raises:
      BadRecord: it has something else where phrases should be.
    """
    ...


def build_phrases(
  source: str, *, max_phrases: int = MAX_PHRASES, max_words: int = MAX_WORDS
) -> Phrases:
  """The source of phrases of a name.

  Args:
    source: see the top of the file.
    max_phrases: of a record; those after it are left out. A vocabulary is
      never cut.
    max_words: in an n-gram.

  Raises:
    InputError: for a name that is none, a file that holds no phrases, or a
      limit below 1.
    ImportError: for a module that there is not.
  """
  if max_phrases < 1 or max_words < 1:
    raise InputError(
      f"max_phrases={max_phrases} and max_words={max_words}: both are at least"
      " 1"
    )
  kind, _, rest = source.partition(":")
  if source == "ngrams":
    return NGrams(max_phrases, max_words)
  if kind == "tags":
    return Tags(rest or "tags", max_phrases)
  if Path(source).expanduser().is_file():
    return read_vocabulary(source)
  if _NAMED.fullmatch(source):
    return _Function(source, max_phrases)
  raise InputError(
    f"phrases={source!r} is no source of phrases, and no file."
    f" {did_you_mean(source, ['ngrams', 'tags', 'tags:FIELD'])} A file has one"
    " phrase a line; MODULE:NAME is a function of a record."
  )


@dataclasses.dataclass(frozen=True)
class NGrams:
  """Runs of a caption's words (OWLv2, Minderer et al. 2023, appendix).

  Words that are generic are dropped, then all runs of up to `max_words` that
  follow on each other are taken, from each word in turn the shortest first;
  those of nothing but stop words are skipped. Captions come in their order.

  Unlike there, punctuation goes before all this (and not after), so that
  "photo." is a generic word and "dog," is "dog", and a run that was there
  before is not counted again.
  """

  max_phrases: int = MAX_PHRASES
  max_words: int = MAX_WORDS
  vocabulary: None = None

  @property
  def settings(self) -> dict[str, Any]:
    """For a manifest."""
    return {
      "source": "ngrams",
      "max_phrases": self.max_phrases,
      "max_words": self.max_words,
    }

  def __call__(self, record: Record) -> list[str]:
    """Phrases of a record's captions."""
    runs = itertools.chain.from_iterable(
      _runs(caption, self.max_words) for caption in record["captions"]
    )
    return _distinct(runs, self.max_phrases)


def _runs(caption: str, max_words: int) -> Iterator[str]:
  kept = [w for w in canonicalize(caption).split() if w not in GENERIC_WORDS]
  for start in range(len(kept)):
    says = False
    for end in range(start, min(start + max_words, len(kept))):
      says = says or kept[end] not in STOP_WORDS
      if says:
        yield " ".join(kept[start : end + 1])


@dataclasses.dataclass(frozen=True)
class Tags:
  """A field of the record's .json: a list, or a string with `,`, `;` or `|`.

  They stay as they are written; of those that differ in case or punctuation
  alone the first counts.
  """

  field: str
  max_phrases: int = MAX_PHRASES
  vocabulary: None = None

  @property
  def settings(self) -> dict[str, Any]:
    """For a manifest."""
    return {
      "source": "tags",
      "field": self.field,
      "max_phrases": self.max_phrases,
    }

  def __call__(self, record: Record) -> list[str]:
    """Tags of a record; none where it lacks the field or has null there."""
    found = record["meta"].get(self.field)
    if found is None:
      return []
    if isinstance(found, str):
      found = _SEPARATORS.split(found)
    return _checked(record, found, f"its {self.field!r}", self.max_phrases)


def read_vocabulary(file: str) -> Vocabulary:
  """The phrases of a file, one a line.

  Blank lines and phrases that were there before (but for case and
  punctuation) are dropped, and a line of the log says how many.

  Raises:
    InputError: it is no text in UTF-8, or holds no phrase.
    OSError: it can't be read.
  """
  path = Path(file).expanduser()
  try:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
  except UnicodeDecodeError as error:
    raise InputError(
      f"{file} is no text in UTF-8 ({error}); a vocabulary has one phrase a"
      " line"
    ) from error
  filled = [line for line in lines if canonicalize(line)]
  phrases = _distinct(filled, len(filled))
  if not phrases:
    raise InputError(
      f"{file} has {len(lines)} lines and no phrase; a vocabulary has one a"
      " line"
    )
  if len(phrases) < len(lines):
    logging.info(
      "%s: %d phrases; dropped %d blank lines and %d that were there before",
      file,
      len(phrases),
      len(lines) - len(filled),
      len(filled) - len(phrases),
    )
  return Vocabulary(tuple(phrases), path.name)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The same phrases for every record."""

  vocabulary: tuple[str, ...]
  name: str = "vocabulary"

  @property
  def settings(self) -> dict[str, Any]:
    """For a manifest; the hash is of the phrases in their order."""
    return {
      "source": "vocabulary",
      "file": self.name,
      "phrases": len(self.vocabulary),
      "hash": hash_phrases(self.vocabulary),
    }

  def __call__(self, record: Record) -> list[str]:
    """All of them."""
    del record
    return list(self.vocabulary)


@dataclasses.dataclass(frozen=True)
class _Function:
  """What `MODULE:NAME` makes of a record."""

  source: str
  max_phrases: int
  vocabulary: None = None

  def __post_init__(self):
    _ = self._function

  @functools.cached_property
  def _function(self) -> Callable[[Record], Iterable[str]]:
    module, _, name = self.source.partition(":")
    try:
      function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
      raise InputError(
        f"phrases={self.source!r}: {error}. The module must be one that Python"
        " finds: set PYTHONPATH to its folder."
      ) from error
    if not callable(function):
      raise InputError(
        f"phrases={self.source!r}: {module} has no function {name!r}."
        f" {did_you_mean(name, _public(module))}"
      )
    return function

  @property
  def settings(self) -> dict[str, Any]:
    """For a manifest."""
    return {"source": self.source, "max_phrases": self.max_phrases}

  def __call__(self, record: Record) -> list[str]:
    """What the function gives, each phrase once."""
    found = self._function(record)
    return _checked(record, found, self.source, self.max_phrases)


def _public(module: str) -> list[str]:
  names = vars(importlib.import_module(module))
  return [name for name in names if not name.startswith("_")]


def required(phrases: Phrases, record: Record) -> tuple[str, ...]:
  """What to look for in a record.

  Raises:
    BadRecord: there is nothing.
  """
  found = tuple(phrases(record))
  if not found:
    raise BadRecord(str(record["key"]), NOTHING)
  return found


def padded(count: int) -> int:
  """To how many phrases a record's are filled up: a power of two, 8 at least.

  One program is compiled for each.
  """
  return max(_LEAST, 1 << (count - 1).bit_length())


def hash_phrases(phrases: Sequence[str]) -> str:
  """64 bits of a list of phrases in its order, in hexadecimal."""
  text = "\n".join(phrases)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _checked(record: Record, found: Any, what: str, limit: int) -> list[str]:
  if not isinstance(found, Iterable) or isinstance(found, str | Mapping):
    found = [found]
  found = list(found)
  if wrong := [item for item in found if not isinstance(item, str)]:
    raise BadRecord(
      str(record["key"]),
      # Not what it is: a reason is counted, and each would have its own.
      f"phrases: {what} has a {type(wrong[0]).__name__} where a string should"
      " be",
    )
  return _distinct(found, limit)


def _distinct(phrases: Iterable[str], limit: int) -> list[str]:
  """The first `limit` that say something new, with single spaces.

  Half of a character, as a cut JSON string has it, becomes a question mark.
  """
  kept: dict[str, str] = {}
  for phrase in phrases:
    if len(kept) >= limit:
      break
    phrase = phrase.encode("utf-8", "replace").decode()
    if plain := canonicalize(phrase):
      kept.setdefault(plain, " ".join(phrase.split()))
  return list(kept.values())
