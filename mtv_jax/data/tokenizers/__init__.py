"""Tokenizers: bytes, scene words, SentencePiece, Hugging Face."""

import os
import shutil
from pathlib import Path, PurePath

from mtv_jax.data.tokenizers.base import Tokenizer as Tokenizer
from mtv_jax.data.tokenizers.base import canonicalize as canonicalize
from mtv_jax.data.tokenizers.base import check_vocabulary as check_vocabulary
from mtv_jax.data.tokenizers.base import clean_for_clip as clean_for_clip
from mtv_jax.data.tokenizers.base import export_files as export_files
from mtv_jax.data.tokenizers.builtin import (
  ByteTokenizer,
  QuestionWordTokenizer,
  SceneWordTokenizer,
)
from mtv_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from mtv_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  ConfigError,
  InputError,
  MissingFileError,
  did_you_mean,
  printable,
)

# Tokenizers that need no file, by name.
BUILT_IN: dict[str, type[Tokenizer]] = {
  "bytes": ByteTokenizer,
  "words": SceneWordTokenizer,
  "question_words": QuestionWordTokenizer,
}
_CHOICES = (
  "a SentencePiece file '*.model' or a 'tokenizer.json' (SigLIP's c4_en is"
  " gs://t5-data/vocabs/cc_en.32000/sentencepiece.model); for training also"
  " ORG/NAME of the Hugging Face hub, or train:32000, trained on the captions"
)
# Tokenizers by file suffix.
_TYPES = {".json": HuggingFaceTokenizer, ".model": SentencePieceTokenizer}
SUFFIXES = tuple(_TYPES)
# Maximum length of a record's text: a megabyte can take seconds.
MAX_CHARACTERS = 100_000


def build_tokenizer(
  spec: str | os.PathLike, *, clean: str = "lower"
) -> Tokenizer:
  """Builds a tokenizer in `BUILT_IN` or from a file.

  `clean` is "none", "lower", "canonicalize" or "clip". Raises like `find_file`,
  and InputError for a file whose content doesn't match its name.
  """
  if (name := os.fspath(spec)) in BUILT_IN:
    return BUILT_IN[name](None, clean)
  file = find_file(spec)
  return _TYPES[file.suffix](os.fspath(file), clean)


def find_file(spec: str | os.PathLike) -> Path:
  """Returns a local copy of a tokenizer's file, next to its other files.

  `spec` is the path of a SentencePiece model ("*.model") or of a Hugging Face
  tokenizer ("*.json"). Raises MissingFileError, InputError for unsupported
  files, or ConfigError if `spec` is not set.
  """
  spec = os.fspath(spec)
  if not spec:
    raise ConfigError(
      "model.text.tokenizer is not set, as a recipe for real data has no"
      " default. Add `:tokenizer=PATH` to --config (after a comma, if it has"
      f" arguments): {_CHOICES}."
    )
  shown = printable(repr(spec))
  if not spec.endswith(SUFFIXES):
    raise InputError(
      f"tokenizer={shown}: {did_you_mean(spec, BUILT_IN)} Or {_CHOICES}."
    )
  if path_lib.is_remote(spec):
    copies = [path_lib.local_copy(file) for file in list_files(spec)]
    for copy in copies[1:]:
      shutil.copyfile(copy, copies[0].with_name(copy.name))
    return copies[0]
  if not (file := Path(spec)).is_file():
    folder = file.absolute().parent
    hint = f"There is no folder {folder}."
    if folder.is_dir():
      names = [p.name for p in folder.glob("*")]
      hint = did_you_mean(file.name, names, limit=8)
    raise MissingFileError(
      f"tokenizer={shown}: there is no such file. {hint} 'bytes' and 'words'"
      f" need no file; others are {_CHOICES}."
    )
  return file


def list_files(path: str | os.PathLike) -> list[PurePath]:
  """Lists a tokenizer's file and, if any, its tokenizer_config.json."""
  file = path_lib.as_path(path)
  config = file.with_name("tokenizer_config.json")
  has_config = file.suffix == ".json" and path_lib.is_file(config)
  return [file, config] if has_config else [file]
