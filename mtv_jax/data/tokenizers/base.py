"""Tokenizer contract: cleaning, encoding to fixed length, export.

Every tokenizer ends a text with the end-of-sequence id, truncates so that this
id stays the last one, and pads on the right. The text towers attend to the
padding, in training too (no mask).
"""

import abc
import json
import os
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32

from mtv_jax.utils.errors import InputError, did_you_mean

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACES = re.compile(r"\s+")


def canonicalize(text: str) -> str:
  """Lower case without punctuation, `_` as a space, single spaces.

  The rule of big_vision's `canonicalize_text`. `transformers` drops `_`
  where this turns it into a space, and is otherwise the same.
  """
  text = text.replace("_", " ").translate(_PUNCTUATION).lower()
  return _SPACES.sub(" ", text).strip()


_CLEANERS: dict[str, Callable[[str], str]] = {
  "none": str,
  "lower": str.lower,
  "canonicalize": canonicalize,
}


class Tokenizer(abc.ABC):
  """Strings to ids. Threads may share one; workers read its file again.

  Args:
    clean: cleaning of a text before it is tokenized: "none", "lower" or
      "canonicalize".

  Attributes:
    kind: "bytes", "sentencepiece" or "json".
    path: of the tokenizer's file; None for bytes.
    clean: as given.
    vocab_size: the largest id plus one.
    pad_id: of the padding.
    eos_id: of the end of a text; None if the file does not name one.

  Raises:
    InputError: an unknown `clean`.
  """

  kind: str
  path: str | None = None
  clean: str
  vocab_size: int
  pad_id: int
  eos_id: int | None

  def __init__(self, clean: str):
    if clean not in _CLEANERS:
      raise InputError(
        f"unknown clean={clean!r}. {did_you_mean(clean, _CLEANERS)}"
      )
    self.clean = clean

  def encode(
    self, strings: Sequence[str], length: int
  ) -> Int32[np.ndarray, "n length"]:
    """Ids of each string, truncated to `length` and padded.

    Raises:
      TypeError: a single string, or an entry that is not a string.
      UnicodeError: a string that is not valid Unicode.
      InputError: `length` is less than 1.
    """
    if isinstance(strings, str):
      raise TypeError(
        f"encode() takes a list of strings, got the string {strings!r}; write"
        " encode([text], length)."
      )
    for i, text in enumerate(strings):
      if not isinstance(text, str):
        raise TypeError(
          f"encode() takes a list of strings; strings[{i}] is {text!r}, a"
          f" {type(text).__name__}."
        )
    if length < 1:
      raise InputError(f"a text has at least 1 token, got length={length}.")
    ids = np.full((len(strings), length), self.pad_id, np.int32)
    for row, text in zip(ids, strings, strict=True):
      tokens = self._ids(self.cleaned(text), length)
      row[: len(tokens)] = tokens
    return ids

  def cleaned(self, text: str) -> str:
    """The text after cleaning, as it is tokenized."""
    return _CLEANERS[self.clean](text)

  @abc.abstractmethod
  def _ids(self, text: str, length: int) -> Sequence[int]:
    """At most `length` ids of a clean text, the end of sequence included."""

  @abc.abstractmethod
  def to_json(self) -> tokenizers.Tokenizer:
    """The same tokenizer, cleaning included, as a `tokenizer.json`."""

  def __reduce__(self) -> tuple:
    # Workers read the file again: neither library's object is plain data.
    arguments = (self.clean,) if self.path is None else (self.path, self.clean)
    return type(self), arguments

  def __repr__(self) -> str:
    return (
      f"Tokenizer({self.path or self.kind}, clean={self.clean},"
      f" vocab_size={self.vocab_size})"
    )


def check_vocabulary(
  tokenizer: Tokenizer, vocab_size: int, where: str = "model.text.vocab_size"
) -> None:
  """Checks that every id has a row in the embedding table.

  Args:
    tokenizer: whose ids are looked up.
    vocab_size: rows of the embedding table.
    where: the config field that sets it, for the error.

  Raises:
    InputError: naming the field and the value it needs.
  """
  if tokenizer.vocab_size > vocab_size:
    raise InputError(
      f"{where}={vocab_size} is too small: {tokenizer!r} gives ids up to"
      f" {tokenizer.vocab_size - 1}. Set {where}={tokenizer.vocab_size} or"
      " more, or use a tokenizer with fewer ids."
    )


def export_files(
  tokenizer: Tokenizer, folder: str | os.PathLike, *, length: int = 64
) -> list[Path]:
  """Writes `tokenizer.json` and `tokenizer_config.json` for `transformers`.

  `AutoTokenizer` then gives the same ids with `padding="max_length"`,
  `truncation=True`, cleaning included. Only `input_ids` are named as model
  inputs: the text towers are trained with attention over the padding.

  Args:
    tokenizer: to export.
    folder: existing; usually that of the exported model.
    length: tokens a text, the default `max_length`.

  Returns:
    The files written.

  Raises:
    InputError: a SentencePiece model that is not of the unigram kind.
  """
  model = tokenizer.to_json()
  model.no_padding()
  model.no_truncation()
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids"],
    "model_max_length": length,
    "padding_side": "right",
    "truncation_side": "right",
    "clean_up_tokenization_spaces": False,
    "pad_token": model.id_to_token(tokenizer.pad_id),
  }
  if tokenizer.eos_id is not None:
    config["eos_token"] = model.id_to_token(tokenizer.eos_id)
  files = [
    Path(folder) / "tokenizer.json",
    Path(folder) / "tokenizer_config.json",
  ]
  files[0].write_text(model.to_str(pretty=False), encoding="utf-8")
  files[1].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
  return files
