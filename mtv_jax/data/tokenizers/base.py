"""Tokenizer interface: cleaning, encoding to a fixed length, export.

Every tokenizer ends texts, even truncated ones, with the end-of-sequence id and
pads on the right. The text towers attend to padding, in training too (no mask).
"""

import abc
import functools
import html
import json
import logging
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import AddedToken, Regex, normalizers, processors

from mtv_jax.utils.errors import InputError, check_choice, printable
from mtv_jax.utils.text import list_first

log = logging.getLogger(__name__)

_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Maximum length of a record's text: a megabyte can take seconds.
MAX_CHARACTERS = 100_000
_MAX_WORD = 256  # Maximum tokens of a word to look up.
_SPACES = re.compile(r"\s+")
# Visible characters: with and without `canonicalize`, which drops punctuation.
_VISIBLE = {
  True: re.compile(rf"[^\s{re.escape(string.punctuation)}]"),
  False: re.compile(r"\S"),
}


def canonicalize(text: str) -> str:
  """Lower-cases, drops punctuation, turns `_` into a space, joins spaces.

  Equals big_vision's `canonicalize_text`; `transformers` drops `_`, but is
  otherwise equal.
  """
  text = text.replace("_", " ").translate(_PUNCTUATION).lower()
  return _SPACES.sub(" ", text).strip()


def clean_for_clip(text: str) -> str:
  """CLIP's cleaning: repairs Unicode and HTML entities, then lower-cases.

  Joins spaces. Raises InputError without the package ftfy.
  """
  try:
    import ftfy  # The import takes 0.1 s; other cleanings don't need it.
  except ImportError:
    raise InputError(
      "clean='clip' needs the package ftfy: pip install ftfy, or set"
      " clean='lower', which leaves HTML entities in texts."
    ) from None
  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return " ".join(text.split()).lower()


def _lowercase(text: str) -> str:
  """Lower-cases each character, like `tokenizers`: without final sigmas."""
  return "".join(map(str.lower, text)) if "\u03a3" in text else text.lower()


# A sigma that `str.lower` turns into a final one: at the end of a word.
_CASED = r"\p{Lu}\p{Ll}\p{Lt}"
_FINAL_SIGMA = Regex(rf"(?<=[{_CASED}\p{{M}}])\u03a3(?!\p{{M}}*[{_CASED}])")
# Each cleaning, in Python and as `tokenizer.json` normalizers.
_CLEANERS: dict[str, tuple[Callable[[str], str], list]] = {
  "none": (str, []),
  "lower": (_lowercase, [normalizers.Lowercase()]),
  "canonicalize": (
    canonicalize,
    [
      normalizers.Replace("_", " "),
      normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
      normalizers.Replace(_FINAL_SIGMA, "\u03c2"),
      normalizers.Lowercase(),
      normalizers.Replace(Regex(r"\s+"), " "),
      normalizers.Strip(),
    ],
  ),
  # As in `transformers`' CLIPTokenizerFast: no normalizer repairs texts.
  "clip": (
    clean_for_clip,
    [
      normalizers.NFC(),
      normalizers.Replace(Regex(r"\s+"), " "),
      normalizers.Strip(),
      normalizers.Lowercase(),
    ],
  ),
}


class Tokenizer(abc.ABC):
  """Maps strings to ids; thread-safe.

  `path` is the tokenizer's file, if it needs one. `clean` is applied to texts
  first: "none", "lower", "canonicalize" or "clip".
  """

  kind: str  # A name of `BUILT_IN`, "sentencepiece" or "json".
  vocab_size: int  # Largest id plus one.
  pad_id: int
  eos_id: int | None  # None if the file doesn't name one.
  unk_id: int | None = None  # Id of unknown words, if any.

  def __init__(self, path: str | None, clean: str):
    check_choice("clean", clean, _CLEANERS)
    self.path, self.clean = path, clean
    self.clean_text("")  # Raises if a package is missing.
    self._checked_words: set[str] = set()  # Words that `encode` has looked up.

  def encode(
    self, strings: Sequence[str], length: int
  ) -> Int32[np.ndarray, "n length"]:
    """Encodes each string, truncated to `length` and padded.

    Lone surrogates, which JSON may contain, become '?'. Warns of unknown words,
    once for each; `encode_text` does not.
    """
    if isinstance(strings, str) or not all(isinstance(s, str) for s in strings):
      raise TypeError(f"encode() takes a list of strings, got {strings!r}.")
    if length < 1:
      raise InputError(f"length={length}: a text has at least 1 token.")
    strings = [s.encode("utf-8", "replace").decode() for s in strings]
    rows = [self.encode_text(text, length)[0] for text in strings]
    array = np.array(rows, np.int32).reshape(-1, length)
    if self.has_unknown(array):
      rows = zip(strings, array, strict=True)
      self._warn_of_unknown([s for s, row in rows if self.has_unknown(row)])
    return array

  def has_unknown(self, ids: Int32[np.ndarray, "*n length"]) -> bool:
    """Whether ids include the id of unknown words."""
    return self.unk_id is not None and bool((ids == self.unk_id).any())

  def _warn_of_unknown(self, texts: Sequence[str]) -> None:
    words = (w for text in texts for w in self.clean_text(text).split())
    words = dict.fromkeys(w.strip(string.punctuation) for w in words)
    words = [w for w in words if w and w not in self._checked_words]
    self._checked_words.update(words)
    unknown_words = [
      w for w in words if self.has_unknown(self.encode_text(w, _MAX_WORD)[0])
    ]
    if unknown_words:
      names = [printable(repr(word), 40) for word in unknown_words]
      log.warning(
        "%r doesn't know %s. Unknown words share one id: texts that differ only"
        " in them have equal embeddings.",
        *(self, list_first(names, 8)),
      )

  def encode_text(
    self, text: str, length: int
  ) -> tuple[Int32[np.ndarray, " length"], bool]:
    """Encodes one text like `encode`; also returns whether it was truncated."""
    ids = np.full(length, self.pad_id, np.int32)
    tokens, is_cut = self._tokenize(text, length)
    ids[: len(tokens)] = tokens
    return ids, is_cut

  def is_cut(self, text: str, length: int) -> bool:
    """Whether a text has more than `length` ids, including end of sequence."""
    return self._tokenize(text, length)[1]

  def is_blank(self, text: str) -> bool:
    """Whether a text is empty or only spaces after cleaning."""
    text = self.clean_text(text) if self.clean == "clip" else text
    return not _VISIBLE[self.clean == "canonicalize"].search(text)

  def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
    """Decodes each row of ids to text, without special tokens."""
    model = self._decoder
    return [model.decode(list(row)) for row in rows]

  @functools.cached_property
  def _decoder(self) -> tokenizers.Tokenizer:
    return self.to_hf_tokenizer()

  def clean_text(self, text: str) -> str:
    """Returns the cleaned text."""
    return _CLEANERS[self.clean][0](text)

  @abc.abstractmethod
  def _tokenize(self, text: str, length: int) -> tuple[Sequence[int], bool]:
    """Cleans a text; returns at most `length` ids, and whether it was cut."""

  @abc.abstractmethod
  def to_hf_tokenizer(self) -> tokenizers.Tokenizer:
    """Builds a `tokenizers` model with equal ids for cleaned text."""

  def __reduce__(self) -> tuple:
    # Worker processes reload the file: the libraries' objects don't pickle.
    return type(self), (self.path, self.clean)

  def __repr__(self) -> str:
    name, size = self.path or self.kind, self.vocab_size
    return f"Tokenizer({name}, clean={self.clean}, vocab_size={size})"


def add_cleaning(model: tokenizers.Tokenizer, clean: str) -> None:
  """Adds cleaning before the model's own normalizer.

  As in `transformers`, special tokens are matched before cleaning: `<EOS>` is
  not an end of sequence.
  """
  if steps := list(_CLEANERS[clean][1]):
    steps += [model.normalizer] if model.normalizer else []
    model.normalizer = normalizers.Sequence(steps)


def add_special_tokens(
  model: tokenizers.Tokenizer, names: Sequence[str], eos: str, eos_id: int
) -> None:
  """Exempts tokens from cleaning, and ends every text with `eos`."""
  model.add_special_tokens(
    [AddedToken(name, special=True, normalized=False) for name in names]
  )
  model.post_processor = processors.TemplateProcessing(
    single=f"$A {eos}",
    pair=f"$A {eos} $B {eos}",
    special_tokens=[(eos, eos_id)],
  )


def check_ids(path: str, vocab_size: int) -> None:
  """Raises InputError if a file lacks tokens, or has ids beyond int32."""
  if not 1 <= vocab_size <= np.iinfo(np.int32).max:
    expected = "at least one token, and 32-bit ids"
    raise InputError(f"{path} has {vocab_size} ids; expected {expected}.")


def check_vocabulary(
  tokenizer: Tokenizer, vocab_size: int, where: str = "model.text.vocab_size"
) -> None:
  """Raises InputError unless every id has a row of the table `where`."""
  if tokenizer.vocab_size > vocab_size:
    count = tokenizer.vocab_size
    raise InputError(
      f"{where}={vocab_size} is too small for ids up to {count - 1} of"
      f" {tokenizer!r}. Set {count} or more, or use another tokenizer."
    )


def export_files(
  tokenizer: Tokenizer,
  folder: str | os.PathLike,
  *,
  length: int = 64,
  fields: Mapping[str, Any] | None = None,
) -> None:
  """Writes `tokenizer.json` and `tokenizer_config.json` for `transformers`.

  `AutoTokenizer` then returns equal ids with `padding="max_length"` (default:
  `length` tokens) and `truncation=True`, cleaning included. By default only
  `input_ids` is a model input, because most text towers are trained with
  attention over padding. With the cleaning 'clip', it does not repair Unicode
  and HTML entities, as in `transformers`. `fields` are added to
  `tokenizer_config.json`. Raises InputError for a SentencePiece model that is
  neither unigram nor BPE.
  """
  model = tokenizer.to_hf_tokenizer()
  model.no_padding()
  model.no_truncation()
  add_cleaning(model, tokenizer.clean)
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids"],
    "model_max_length": length,
    "padding_side": "right",
    "truncation_side": "right",
    "clean_up_tokenization_spaces": False,
    # For our own reader; tokenizer.json already includes the cleaning.
    "clean": tokenizer.clean,
    "pad_token": model.id_to_token(tokenizer.pad_id),
    **(fields or {}),
  }
  if tokenizer.eos_id is not None:
    config["eos_token"] = model.id_to_token(tokenizer.eos_id)
  write_files(folder, model, config)


def write_files(
  folder: str | os.PathLike,
  model: tokenizers.Tokenizer,
  config: Mapping[str, Any],
) -> None:
  """Writes `tokenizer.json` and `tokenizer_config.json`."""
  for name, text in (
    ("tokenizer.json", model.to_str()),
    ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
  ):
    Path(folder, name).write_text(text, encoding="utf-8")
