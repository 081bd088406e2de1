"""CLIP's BPE tokenizer, read from `vocab.json` and `merges.txt`.

For older folders without `tokenizer.json`: byte-level BPE on lower-cased text,
with `</w>` at the end of words.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import models, normalizers, pre_tokenizers, processors

from mtv_jax.utils.errors import InputError, MissingFileError

VOCABULARY = "vocab.json"
MERGES = "merges.txt"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# Radford et al. 2021: contractions, letters, single digits, punctuation.
_WORD = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
  r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
  """Encodes texts like `CLIPTokenizer` of `transformers`."""

  def __init__(self, folder: str | os.PathLike):
    files = [pathlib.Path(folder) / name for name in (VOCABULARY, MERGES)]
    for file in files:
      if not file.is_file():
        raise MissingFileError(
          f"There is no {file}. A tokenizer is a tokenizer.json, or a "
          f"{VOCABULARY} with a {MERGES}: copy those of the model's processor."
        )
    try:
      vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
      lines = files[1].read_text(encoding="utf-8").splitlines()
      pairs = [tuple(s.split()) for s in lines if not s.startswith("#version")]
      merges = [pair for pair in pairs if pair]
      special = [(token, vocabulary[token]) for token in (_START, _END)]
      model = models.BPE(
        vocabulary, merges, end_of_word_suffix="</w>", unk_token=_END
      )
    except (KeyboardInterrupt, SystemExit):
      raise
    except BaseException as error:
      # The library raises bare Exception; its panics are BaseException.
      raise InputError(
        f"{files[0]} and {MERGES} are not CLIP's ({error!r}): expected ids of "
        f"tokens, with {_START} and {_END}, and a pair of tokens per line."
      ) from error
    self._end = vocabulary[_END]
    self._model = tokenizers.Tokenizer(model)
    self._model.normalizer = normalizers.Sequence(
      [
        normalizers.NFC(),
        normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
        normalizers.Lowercase(),
      ]
    )
    self._model.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(
          tokenizers.Regex(_WORD), behavior="removed", invert=True
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
    self._model.post_processor = processors.TemplateProcessing(
      single=f"{_START} $A {_END}", special_tokens=special
    )
    self._model.add_special_tokens([_START, _END])

  def encode(
    self, strings: Sequence[str], length: int
  ) -> Int32[np.ndarray, "n length"]:
    """Ids of each string with start and end, truncated or padded with end."""
    ids = np.full((len(strings), length), self._end, np.int32)
    encodings = self._model.encode_batch(list(strings))
    # The last id stays, so that truncated texts end with the end token.
    for row, encoding in zip(ids[:, :-1], encodings, strict=True):
      part = encoding.ids[: length - 1]
      row[: len(part)] = part
    return ids
