"""From a config's `text.tokenizer` and `text.clean` to a tokenizer.

`TokenizerSource` finds the file (built in, a path, the hub, trained),
`TokenizerFiles` builds the `Tokenizer`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
import shutil
from collections.abc import MutableMapping
from pathlib import Path, PurePath
from typing import Literal

import filelock

from mtv_jax.config.registry import LazyRegistry
from mtv_jax.data.tokenizers.base import Tokenizer
from mtv_jax.utils import atomic, hub
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  ConfigError,
  InputError,
  MissingFileError,
  UserError,
  did_you_mean,
  printable,
)

log = logging.getLogger(__name__)

_PACKAGE = "mtv_jax.data.tokenizers"
# Tokenizers that need no file, by name.
BUILT_IN: LazyRegistry[type[Tokenizer]] = LazyRegistry(
  {
    "bytes": f"{_PACKAGE}.builtin:ByteTokenizer",
    "words": f"{_PACKAGE}.builtin:SceneWordTokenizer",
    "question_words": f"{_PACKAGE}.builtin:QuestionWordTokenizer",
  }
)
# Tokenizers by file suffix.
_TYPES: LazyRegistry[type[Tokenizer]] = LazyRegistry(
  {
    ".json": f"{_PACKAGE}.huggingface:HuggingFaceTokenizer",
    ".model": f"{_PACKAGE}.sentencepiece:SentencePieceTokenizer",
  }
)
_SUFFIXES = tuple(_TYPES)
# Name of the file of a trained model.
TRAINED = "tokenizer.model"
_CHOICES = (
  "a SentencePiece file '*.model' or a 'tokenizer.json' (SigLIP's c4_en is"
  " gs://t5-data/vocabs/cc_en.32000/sentencepiece.model); for training also"
  " ORG/NAME of the Hugging Face hub, or train:32000, trained on the captions"
)
# Tokenizer files in a hub repository, in order of preference.
_FILES = (
  "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TokenizerSource:
  """A config's `text.tokenizer` and `text.clean`.

  `spec` is "bytes", "words", a file's path, `ORG/NAME[@REVISION]` on the hub,
  or "train:N".
  """

  spec: str
  clean: str

  @property
  def trained_size(self) -> int | None:
    """N of "train:N", else None; raises ConfigError if N is not a number."""
    return trained_size(self.spec)

  @property
  def is_hub(self) -> bool:
    if self.trained_size or self.spec.endswith(_SUFFIXES):
      return False
    return hub.is_name(self.spec)

  def pin(self, commits: MutableMapping[str, str]) -> TokenizerSource:
    """Pins a hub tokenizer to the commit in `commits`, or adds it there."""
    repo, _, revision = self.spec.partition("@")
    if re.fullmatch("[0-9a-f]{40}", revision) or not self.is_hub:
      return self
    if self.spec not in commits:
      commits[self.spec] = hub.download(self.spec, _FILES).name
    return dataclasses.replace(self, spec=f"{repo}@{commits[self.spec]}")

  def count_ids(
    self, default: int, *, reads_files: bool, is_required: bool
  ) -> int | None:
    """Size of the vocabulary; `default` if it can't be read.

    Without `reads_files`, returns None unless it is built in. If a tokenizer
    can't be read, raises an error if it `is_required`, else warns.
    """
    is_built_in = self.spec in BUILT_IN
    if size := self.trained_size:
      return size
    if not (reads_files or is_built_in):
      return None
    size = default
    if not self.spec:  # Training rejects it, with a hint for its `init`.
      return size
    if path_lib.is_remote(self.spec):
      # Retries an unreachable bucket for minutes.
      log.info("Reading the tokenizer %s.", self.spec)
    try:
      return self.find_files().build().vocab_size
    except (UserError, OSError, ImportError) as error:
      if is_required:
        raise
      log.warning("vocab_size=%d: the tokenizer can't be read: %s", size, error)
      return size

  def find_files(self, run: PurePath | None = None) -> TokenizerFiles:
    """Finds the copy in a run's folder, or else the file that `spec` names.

    Prefers the SentencePiece model of a hub repository, from which SigLIP's and
    T5's other files are derived. Raises MissingFileError if there
    is none, and the errors of `find_file`.
    """
    if self.spec in BUILT_IN:
      return TokenizerFiles(None, self.clean, self.spec)
    name = TRAINED if self.trained_size else self.spec
    names = _FILES[:2] if self.is_hub else [PurePath(name).name]
    copies = [run / "tokenizer" / name for name in names] if run else []
    copy = next(filter(path_lib.is_file, copies), None)
    if copy is None and self.is_hub:
      return TokenizerFiles(self._download(), self.clean)
    if copy is None and run and not path_lib.is_file(self.spec):
      raise MissingFileError(
        f"the tokenizer of this run is at neither {copies[0]} nor {self.spec};"
        " copy it to the first"
      )
    return TokenizerFiles(find_file(copy or self.spec), self.clean)

  def _download(self) -> Path:
    folder = hub.download(self.spec, _FILES)
    files = read_tokenizer(folder, lower_case=True, add_end=True)
    if files is None or files.path is None or not files.path.is_file():
      raise MissingFileError(
        f"tokenizer={self.spec!r}: the repository has no spiece.model,"
        " tokenizer.json or tokenizer.model."
      )
    return files.path


def trained_size(spec: str) -> int | None:
  """Pieces N of a tokenizer "train:N"; None for other tokenizers.

  Raises ConfigError if N is not a positive number.
  """
  if not spec.startswith("train:"):
    return None
  if not re.fullmatch(r"train:0*[1-9]\d{0,6}", spec):
    raise ConfigError(
      f"tokenizer={printable(repr(spec))}: expected train:N, a number of pieces"
      " such as train:32000."
    )
  return int(spec.removeprefix("train:"))


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
  if not spec.endswith(_SUFFIXES):
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


Cleaning = Literal["none", "lower", "canonicalize", "clip"]


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """A tokenizer's file and text cleaning.

  Attributes:
    path: SentencePiece or `tokenizer.json` file; None for a built-in tokenizer.
    clean: 'none', 'lower', 'canonicalize' or 'clip', see `data.tokenizers`.
    built_in: name of the built-in tokenizer if `path` is None.
  """

  path: Path | None
  clean: str = "none"
  built_in: str = "bytes"

  def build(self) -> Tokenizer:
    """Builds the tokenizer."""
    spec = self.built_in if self.path is None else str(self.path)
    return build_tokenizer(spec, clean=self.clean)


def _convert_sentencepiece(path: Path, *, add_end: bool) -> Path:
  """Converts a `tokenizer.model` to a cached `tokenizer.json`."""
  from mtv_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer

  content = b"%d%s" % (add_end, path.read_bytes())
  digest = hashlib.blake2b(content, digest_size=12)
  folder = path_lib.cache_folder() / f"tokenizer-{digest.hexdigest()}"
  folder.parent.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(f"{folder}.lock"):
    if not folder.exists():
      tokenizer = SentencePieceTokenizer(str(path), "lower")
      with atomic.replace_folder(folder) as temporary:
        tokenizer.write_folder(temporary, add_end=add_end)
  return folder / "tokenizer.json"


def read_tokenizer(
  folder: Path, *, lower_case: bool, add_end: bool
) -> TokenizerFiles | None:
  """Reads the tokenizer of a Hugging Face folder; None if absent.

  For `lower_case` and `add_end` see `family.Family`.
  """
  from mtv_jax.config import foreign  # Not for runs with a file.

  path = folder / "tokenizer_config.json"
  with foreign.errors_of(path):
    config = foreign.read_fields(
      foreign.read_object(path), {"clean": Cleaning, "do_lower_case": bool}
    )
  spiece_path, json_path = folder / "spiece.model", folder / "tokenizer.json"
  if clean := config.get("clean"):
    # One of our exports, without its mtv_jax.json.
    is_spiece = spiece_path.is_file()
    return TokenizerFiles(spiece_path if is_spiece else json_path, clean)
  if lower_case and spiece_path.is_file():
    # SiglipTokenizer removes punctuation first, then lower-cases.
    if not config.get("do_lower_case", True):
      log.warning("do_lower_case=False is ignored; text is lower-cased.")
    return TokenizerFiles(spiece_path, "canonicalize")
  if json_path.is_file():
    # SigLIP 2 was trained on lower-cased text; not every version of its
    # tokenizer.json lower-cases.
    return TokenizerFiles(json_path, "lower" if lower_case else "none")
  model_path = folder / "tokenizer.model"
  if lower_case and model_path.is_file():
    path = _convert_sentencepiece(model_path, add_end=add_end)
    return TokenizerFiles(path, "lower")
  if (folder / "merges.txt").is_file():
    log.warning(
      "%s lacks a tokenizer.json, so text can't be encoded: save its tokenizer "
      "once with transformers.",
      folder,
    )
  return None
