"""Files of tokenizers: of a hub's repository, a run's copy, or a path."""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import MutableMapping

from mtv_jax.convert import processors
from mtv_jax.data import tokenizers
from mtv_jax.data.tokenizers import training
from mtv_jax.encoder import hub
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import TextConfig
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import MissingFileError, UserError

log = logging.getLogger(__name__)

# Files of a hub's repository that a tokenizer takes, by preference.
_FILES = (
  "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
)  # fmt: skip
_SUFFIXES = (".json", ".model")


def is_hub(spec: str) -> bool:
  """Whether a tokenizer is that of a hub repository, not a file's path."""
  if training.trained_size(spec) or pathlib.Path(spec).suffix in _SUFFIXES:
    return False
  return hub.is_name(spec)


def pin(name: str, commits: MutableMapping[str, str]) -> str:
  """Pins a hub tokenizer to `ORG/NAME@COMMIT`, of or added to `commits`.

  Returns other tokenizers unchanged.
  """
  repo, _, revision = name.partition("@")
  if re.fullmatch("[0-9a-f]{40}", revision) or not is_hub(name):
    return name
  if name not in commits:
    commits[name] = hub.download(name, _FILES).name
  return f"{repo}@{commits[name]}"


def count_tokens(
  spec: str, clean: str, *, reads_files: bool = True
) -> int | None:
  """Size of a tokenizer's vocabulary; SigLIP's 32,000 if it can't be read.

  Without `reads_files`, None if it isn't built in.
  """
  if size := training.trained_size(spec):
    return size
  if not reads_files and spec not in tokenizers.BUILT_IN:
    return None
  try:
    file = download(spec)
    return tokenizers.build_tokenizer(file, clean=clean).vocab_size
  except (UserError, OSError, ImportError) as error:
    size = TextSpec.vocab_size
    if spec:  # Training rejects it.
      log.warning("vocab_size=%d, as the tokenizer isn't read: %s", size, error)
    return size


def download(name: str) -> str | pathlib.Path:
  """The tokenizer's file of a hub repository; other tokenizers unchanged.

  Prefers a SentencePiece model, from which SigLIP's and T5's other files are
  derived. Raises MissingFileError if the repository has none.
  """
  if not is_hub(name):
    return name
  folder = hub.download(name, _FILES)
  files = processors.read_tokenizer(folder, lower_case=True, add_end=True)
  if files is None or files.path is None or not files.path.is_file():
    raise MissingFileError(
      f"tokenizer={name!r}: the repository has no spiece.model, tokenizer.json"
      " or tokenizer.model."
    )
  return files.path


def read_run_tokenizer(
  folder: pathlib.PurePath, text: TextConfig | None
) -> processors.TokenizerFiles | None:
  """The run's copy of the tokenizer, else the file named in the config."""
  if text is None:
    return None
  spec, clean = text.tokenizer, text.clean
  if spec in processors.BUILT_IN_TOKENIZERS:
    return processors.TokenizerFiles(None, clean, spec)
  of_hub = is_hub(spec)
  named = training.TRAINED if training.trained_size(spec) else spec
  names = _FILES[:2] if of_hub else [pathlib.PurePath(named).name]
  files = [folder / "tokenizer" / name for name in names]
  for file in [*files, path_lib.as_path(spec)]:
    if path_lib.is_file(file):
      return processors.TokenizerFiles(tokenizers.copy_file(file), clean)
  if of_hub:
    file = pathlib.Path(download(spec))
    return processors.TokenizerFiles(file, clean)
  raise MissingFileError(
    f"the tokenizer of this run is at neither {files[0]} nor {spec}; copy it to"
    " the first"
  )
