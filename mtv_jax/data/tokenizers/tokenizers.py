"""Text to token ids: bytes, SentencePiece files, Hugging Face `tokenizer.json`.

All three end a text with the end-of-sequence id, cut it so that this id stays
the last one, and pad on the right. SentencePiece is padded with that same id,
as SigLIP is; attention sees the padding, as in training (no mask).

`export_files` writes what `transformers` needs to give the same ids.
"""

import abc
import functools
import json
import os
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Int32

from mtv_jax.config.schema import did_you_mean
from mtv_jax.data.tokenizers import tokenizer_json

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACES = re.compile(r"\s+")

# Names that end and pad a text in common vocabularies, most specific first;
# asked only where no file says it.
_EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>", "[SEP]")
_PAD_NAMES = ("<pad>", "[PAD]", *_EOS_NAMES)


def canonicalize(text: str) -> str:
  """Lower case without punctuation, `_` as a space, single spaces.

  The rule of big_vision's `canonicalize_text`. `transformers` drops `_`
  where this makes it a space, and is otherwise the same.
  """
  text = text.replace("_", " ").translate(_PUNCTUATION).lower()
  return _SPACES.sub(" ", text).strip()


_CLEANERS: dict[str, Callable[[str], str]] = {
  "none": str,
  "lower": str.lower,
  "canonicalize": canonicalize,
}


class Tokenizer(abc.ABC):
  """Strings to ids. Threads may share one; worker processes rebuild theirs.

  Attributes:
    kind: "bytes", "sentencepiece" or "json".
    path: of the file it was read from; None for bytes.
    clean: what is done to a text first: "none", "lower" or "canonicalize".
    vocab_size: one more than the largest id.
    pad_id: what fills a row up.
    eos_id: what ends a text; None if the file does not say.
  """

  kind: str
  path: str | None = None
  clean: str
  vocab_size: int
  pad_id: int
  eos_id: int | None

  def __init__(self, clean: str):
    if clean not in _CLEANERS:
      raise ValueError(
        f"unknown clean={clean!r}. {did_you_mean(clean, _CLEANERS)}"
      )
    self.clean = clean

  def encode(
    self, strings: Sequence[str], length: int
  ) -> Int32[np.ndarray, "n length"]:
    """Ids of each string, cut to `length` and padded.

    Raises:
      TypeError: one string instead of several, or what is no string.
      UnicodeError: a string that is not valid Unicode.
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
      raise ValueError(f"a text has at least 1 token, got length={length}.")
    ids = np.full((len(strings), length), self.pad_id, np.int32)
    for row, text in zip(ids, strings, strict=True):
      tokens = self._ids(self.cleaned(text), length)
      row[: len(tokens)] = tokens
    return ids

  def cleaned(self, text: str) -> str:
    """The text as it is tokenized."""
    return _CLEANERS[self.clean](text)

  @abc.abstractmethod
  def _ids(self, text: str, length: int) -> Sequence[int]:
    """At most `length` ids of a clean text, its end included."""

  @abc.abstractmethod
  def to_json(self) -> tokenizers.Tokenizer:
    """The same tokenizer, cleaning included, as a `tokenizer.json`."""

  def __reduce__(self) -> tuple:
    # Workers read the file again: neither library's object is plain data.
    build = functools.partial(build_tokenizer, clean=self.clean)
    return build, (self.path or "bytes",)

  def __repr__(self) -> str:
    return (
      f"Tokenizer({self.path or self.kind}, clean={self.clean},"
      f" vocab_size={self.vocab_size})"
    )


class _Bytes(Tokenizer):
  """UTF-8: 0 pads, 1 ends, byte b is b + 2."""

  kind = "bytes"
  vocab_size, pad_id, eos_id = 258, 0, 1

  def _ids(self, text: str, length: int) -> Sequence[int]:
    data = text.encode()[: length - 1]
    return [*(byte + 2 for byte in data), self.eos_id]

  def to_json(self) -> tokenizers.Tokenizer:
    return tokenizer_json.from_bytes(self.clean)


class _SentencePiece(Tokenizer):
  """As `SiglipTokenizer` of `transformers`, but for the cleaning."""

  kind = "sentencepiece"

  def __init__(self, path: str, clean: str):
    super().__init__(clean)
    self.path = path
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
      raise ValueError(
        f"{path} is no SentencePiece model ({error}); expected the binary file"
        " that SentencePiece's trainer writes, often called spiece.model."
      ) from error
    self.vocab_size = self._model.vocab_size()
    self.pad_id = self.eos_id = self._model.eos_id()
    if self.eos_id < 0:
      raise ValueError(
        f"{path} has no end-of-sequence piece; train it with --eos_id set."
      )

  def _ids(self, text: str, length: int) -> Sequence[int]:
    return [*self._model.encode(text)[: length - 1], self.eos_id]

  def to_json(self) -> tokenizers.Tokenizer:
    model = self._model.serialized_model_proto()
    return tokenizer_json.from_sentencepiece(model, self.clean, str(self.path))


class _Json(Tokenizer):
  """A `tokenizer.json`; its own post-processor adds the special tokens."""

  kind = "json"

  def __init__(self, path: str, clean: str):
    super().__init__(clean)
    self.path = path
    try:
      self._text = Path(path).read_text(encoding="utf-8")
      model = tokenizers.Tokenizer.from_str(self._text)
    except Exception as error:
      # The library raises bare Exception for whatever it can't parse.
      raise ValueError(
        f"{path} is no tokenizer.json ({error}); expected the file that"
        " `tokenizers` and the fast tokenizers of `transformers` save."
      ) from error
    vocabulary = model.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    told = _told(Path(path).with_name("tokenizer_config.json"))
    self.eos_id = _find(vocabulary, told.get("eos_token"), _EOS_NAMES)
    padding = model.padding or {}
    pad_name = told.get("pad_token") or padding.get("pad_token")
    pad_id = _find(vocabulary, pad_name, _PAD_NAMES)
    if pad_id is None:
      raise ValueError(
        f"{path} has no padding token: neither tokenizer_config.json beside it"
        f" (pad_token) nor its own padding section names one, and it has none"
        f" of {', '.join(_PAD_NAMES)}. Add pad_token to tokenizer_config.json."
      )
    self.pad_id = pad_id

  @functools.lru_cache(maxsize=8)  # noqa: B019 - few, and they live as long
  def _cut(self, length: int) -> tokenizers.Tokenizer:
    # Truncation is a setting of the object: one object a length, so that
    # threads asking for different lengths can't disturb each other.
    model = tokenizers.Tokenizer.from_str(self._text)
    model.no_padding()
    model.enable_truncation(length)
    return model

  def _ids(self, text: str, length: int) -> Sequence[int]:
    return self._cut(length).encode(text).ids

  def to_json(self) -> tokenizers.Tokenizer:
    return tokenizer_json.from_json(self._text, self.clean)


def _told(path: Path) -> dict[str, str]:
  """The special tokens that a tokenizer_config.json names, as strings."""
  if not path.is_file():
    return {}
  names = {}
  for key, value in json.loads(path.read_text(encoding="utf-8")).items():
    if isinstance(value, dict):
      value = value.get("content")
    if key.endswith("_token") and isinstance(value, str):
      names[key] = value
  return names


def _find(
  vocabulary: dict[str, int], name: str | None, names: Sequence[str]
) -> int | None:
  """The id of `name`, or of the first of `names` that there is."""
  if name in vocabulary:
    return vocabulary[name]
  return next((vocabulary[n] for n in names if n in vocabulary), None)


def build_tokenizer(
  spec: str | os.PathLike, *, clean: str = "lower"
) -> Tokenizer:
  """The tokenizer that a config names.

  Args:
    spec: "bytes", the path of a SentencePiece model ("*.model"), or of a
      Hugging Face tokenizer ("*.json").
    clean: "none", "lower" or "canonicalize".

  Raises:
    FileNotFoundError: the file is missing; says what was expected.
    ValueError: the file is of another kind, or `clean` is unknown.
  """
  spec = os.fspath(spec)
  if spec == "bytes":
    return _Bytes(clean)
  kinds: dict[str, Any] = {".model": _SentencePiece, ".json": _Json}
  suffix = Path(spec).suffix
  if suffix not in kinds:
    raise ValueError(
      f"tokenizer={spec!r}: expected 'bytes' (built in, 258 ids), a"
      " SentencePiece file '*.model' or a Hugging Face 'tokenizer.json'."
    )
  if not Path(spec).is_file():
    folder = Path(spec).absolute().parent
    there = [p.name for p in folder.glob("*")] if folder.is_dir() else []
    hint = did_you_mean(Path(spec).name, there, limit=8)
    if not folder.is_dir():
      hint = f"There is no folder {folder}."
    raise FileNotFoundError(
      f"tokenizer={spec!r}: there is no such file. {hint} Expected a"
      " SentencePiece model or a tokenizer.json; 'bytes' needs no file."
    )
  return kinds[suffix](spec, clean)


def check_vocabulary(
  tokenizer: Tokenizer, vocab_size: int, where: str = "model.text.vocab_size"
) -> None:
  """Makes sure that every id has a row in the embedding table.

  Args:
    tokenizer: gives the ids.
    vocab_size: rows of the model's table.
    where: the config field that sets it.

  Raises:
    ValueError: naming the field and the value it needs.
  """
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f"{where}={vocab_size} is too small: {tokenizer!r} gives ids up to"
      f" {tokenizer.vocab_size - 1}. Set {where}={tokenizer.vocab_size} or"
      " more, or use a tokenizer with fewer ids."
    )


def export_files(
  tokenizer: Tokenizer, folder: str | os.PathLike, *, length: int = 64
) -> list[Path]:
  """Writes `tokenizer.json` and `tokenizer_config.json` for `transformers`.

  `AutoTokenizer` then gives our ids with `padding="max_length"`,
  `truncation=True`, cleaning included. Only `input_ids` are named as model
  inputs: the text towers are trained with attention over the padding.

  Args:
    tokenizer: to export.
    folder: existing; usually that of the exported model.
    length: tokens a text, the default `max_length`.

  Returns:
    The files written.

  Raises:
    ValueError: a SentencePiece model that is not of the unigram kind.
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
