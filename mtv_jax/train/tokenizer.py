"""The tokenizer of a run: read, trained on the captions, compared."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from mtv_jax.checkpoint.reading import saved_steps
from mtv_jax.data import tokenizers
from mtv_jax.data.sources.base import Source, sample_captions
from mtv_jax.data.tokenizers.source import TRAINED, TokenizerSource
from mtv_jax.parallel.distributed import agree, gather_results
from mtv_jax.train.config import RunConfig
from mtv_jax.train.param_source import open_param_source
from mtv_jax.train.workdir import read_recorded_config
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError, MissingFileError
from mtv_jax.utils.tree import select_names

log = logging.getLogger(__name__)

# Number of records on whose captions a tokenizer is trained.
_CAPTION_RECORDS = 100_000
# Tokenizers that encode these equally are considered equal. They cover case,
# punctuation, digits, spaces and non-ASCII letters.
_PROBE_TEXTS = (
  "A photo of 2 dogs, playing!  It's Mary's red-and-white BALL.",
  "ein Mädchen im Café \u2013 \u00bfd\u00f3nde? \u732b\u3068\u72ac",
  "a small blue circle left of a large green square",
)


def require_tokenizer(config: RunConfig) -> None:
  """Raises ConfigError if a text tower has no tokenizer set."""
  if config.model.text is None or config.model.text.tokenizer:
    return
  if config.init:
    path = config.init.path
    # If the folder is missing, the error is about the recipe's own tokenizer.
    with contextlib.suppress(MissingFileError):
      if open_param_source().read_model_info(path).tokenizer is None:
        raise ConfigError(
          f"config.model.text.tokenizer is not set, and {path} has no tokenizer"
          " that can be read (tokenizer.json, spiece.model or tokenizer.model)."
          " Add the file, or set --config.model.text.tokenizer=FILE."
        )
  tokenizers.find_file("")


def build_tokenizer(
  config: RunConfig, workdir: str | os.PathLike, sources: Sequence[Source]
) -> tokenizers.Tokenizer | None:
  """The tokenizer of a config; None for a model without text.

  A run with checkpoints reads the copy in its folder, unless a file is named;
  a new run may train a tokenizer on its sources' captions.
  """
  if (text := config.model.text) is None:
    return None
  source = TokenizerSource(text.tokenizer, text.clean)
  run = path_lib.as_path(workdir) if saved_steps(workdir) else None
  if run is not None:
    _check_tokenizer_unchanged(config, run)
  elif source.trained_size:
    source = _train_tokenizer(config, source, sources)
  is_named = path_lib.is_file(source.spec)
  tokenizer = source.find_files(None if is_named else run).build()
  where = "config.model.text.vocab_size"
  tokenizers.check_vocabulary(tokenizer, text.vocab_size, where=where)
  if (pad_id := text.options.get("pad_id")) not in (None, tokenizer.pad_id):
    log.warning(
      f"config.model.text.pad_id is {pad_id}, but {tokenizer!r} pads with"
      f" {tokenizer.pad_id}: the text tower does not exclude padding. Set"
      f" --config.model.text.pad_id={tokenizer.pad_id}."
    )
  if run is None:
    check_source_tokenizer(config, tokenizer)
  return tokenizer


def _check_tokenizer_unchanged(
  config: RunConfig, folder: pathlib.PurePath
) -> None:
  """Raises ConfigError if a run with checkpoints had a different tokenizer."""
  recorded = (read_recorded_config(folder).get("model") or {}).get("text") or {}
  text = config.model.text
  for name, new in (("tokenizer", text.tokenizer), ("clean", text.clean)):
    old = recorded.get(name, new)
    # A file may have moved, with the same content.
    if pathlib.PurePath(old).name != pathlib.PurePath(new).name:
      raise ConfigError(
        f"This run was trained with text.{name}={old!r}; {new!r} changes"
        " token ids. Restore the old value, or start a new run."
      )


def _train_tokenizer(
  config: RunConfig,
  tokenizer_source: TokenizerSource,
  sources: Sequence[Source],
) -> TokenizerSource:
  """Trains a tokenizer on the sources' captions, in a cached file.

  Collective: process 0 trains, and the others receive its model.
  """
  size = tokenizer_source.trained_size

  def train() -> bytes:
    if jax.process_index():
      return b""
    from mtv_jax.data.tokenizers.sentencepiece import train_sentencepiece

    log.info("Training a tokenizer of %d pieces from the captions.", size)
    captions = sample_captions(sources, _CAPTION_RECORDS)
    return train_sentencepiece(captions, size, tokenizer_source.clean)

  agree({"config": config.to_dict()})  # Checks that all processes call this.
  data = gather_results(train)[0]
  digest = hashlib.blake2b(data, digest_size=12).hexdigest()
  file = path_lib.cache_folder() / f"tokenizer-{digest}" / TRAINED
  file.parent.mkdir(parents=True, exist_ok=True)
  atomic.write(file, data)
  return dataclasses.replace(tokenizer_source, spec=str(file))


def check_source_tokenizer(config: RunConfig, tokenizer: Any) -> None:
  """Raises ConfigError if a loaded text tower needs a different tokenizer.

  The run's tokenizer, with its cleaning, must encode texts like the tokenizer
  of `config.init.path`.
  """
  init = config.init
  if not init or init.new_tokenizer or tokenizer is None:
    return
  if not select_names(["text/token_embedding"], init.include or ("",)):
    return
  files = open_param_source().read_model_info(init.path).tokenizer
  if files is None:
    return
  source, length = files.build(), config.model.text.length
  for text in _PROBE_TEXTS:
    pair = (source, tokenizer)
    theirs, ours = (t.encode_text(text, length)[0] for t in pair)
    if list(theirs) != list(ours):
      raise ConfigError(
        f"config.model.text: {init.path} was trained with {source!r}, but this "
        f"run has {tokenizer!r}, which encodes {text!r} differently. Use "
        "the source's tokenizer and clean, or set "
        "config.init.new_tokenizer=True to learn new token embeddings."
      )
