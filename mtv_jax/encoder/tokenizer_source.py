"""Tokenizers that configs name: built in, from files or the hub, or trained."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
from collections.abc import MutableMapping

from mtv_jax.convert import processors
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.data import tokenizers
from mtv_jax.data.tokenizers import training
from mtv_jax.models.text import TextSpec
from mtv_jax.utils import hub
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import MissingFileError, UserError

log = logging.getLogger(__name__)

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
    return training.trained_size(self.spec)

  @property
  def is_hub(self) -> bool:
    if self.trained_size or self.spec.endswith(tokenizers.SUFFIXES):
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

  def count_ids(self, *, reads_files: bool, is_required: bool) -> int | None:
    """Size of the vocabulary; SigLIP's 32,000 if it can't be read.

    Without `reads_files`, returns None unless it is built in. If a tokenizer
    can't be read, raises an error if it `is_required`, else warns.
    """
    is_built_in = self.spec in tokenizers.BUILT_IN
    if size := self.trained_size:
      return size
    if not (reads_files or is_built_in):
      return None
    size = TextSpec.vocab_size
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

  def find_files(self, run: pathlib.PurePath | None = None) -> TokenizerFiles:
    """Finds the copy in a run's folder, or else the file that `spec` names.

    Prefers the SentencePiece model of a hub repository, from which SigLIP's and
    T5's other files are derived. Raises MissingFileError if there
    is none, and the errors of `tokenizers.find_file`.
    """
    if self.spec in tokenizers.BUILT_IN:
      return TokenizerFiles(None, self.clean, self.spec)
    name = training.TRAINED if self.trained_size else self.spec
    names = _FILES[:2] if self.is_hub else [pathlib.PurePath(name).name]
    copies = [run / "tokenizer" / name for name in names] if run else []
    copy = next(filter(path_lib.is_file, copies), None)
    if copy is None and self.is_hub:
      return TokenizerFiles(self._download(), self.clean)
    if copy is None and run and not path_lib.is_file(self.spec):
      raise MissingFileError(
        f"the tokenizer of this run is at neither {copies[0]} nor {self.spec};"
        " copy it to the first"
      )
    return TokenizerFiles(tokenizers.find_file(copy or self.spec), self.clean)

  def _download(self) -> pathlib.Path:
    folder = hub.download(self.spec, _FILES)
    files = processors.read_tokenizer(folder, lower_case=True, add_end=True)
    if files is None or files.path is None or not files.path.is_file():
      raise MissingFileError(
        f"tokenizer={self.spec!r}: the repository has no spiece.model,"
        " tokenizer.json or tokenizer.model."
      )
    return files.path
