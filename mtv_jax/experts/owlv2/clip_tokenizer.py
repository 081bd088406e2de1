"""CLIP's BPE tokenizer, read from `vocab.json` and `merges.txt`.

Older folders have no `tokenizer.json`, which holds all of it: byte-level BPE
whose words end in `</w>`, on lower-cased text.
"""

from __future__ import annotations

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
# Radford et al. 2021: contractions, letters, single digits, other marks.
_WORD = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
  r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
  """Texts to ids, as `CLIPTokenizer` of `transformers` has them.

  Args:
    folder: with `vocab.json` and `merges.txt`.

  Raises:
    MissingFileError: one of them is missing.
    InputError: they are not what they should be.
  """

  def __init__(self, folder: str | os.PathLike):
    path = pathlib.Path(folder)
    for name in (VOCABULARY, MERGES):
      if not (path / name).is_file():
        raise MissingFileError(
          f"{path} has no {name}. A tokenizer is a tokenizer.json, or a "
          f"{VOCABULARY} with a {MERGES}: copy those of the model's processor."
        )
    try:
      vocabulary = json.loads((path / VOCABULARY).read_text("utf-8"))
      merges = _read_merges(path / MERGES)
      self._ends = [vocabulary[_START], vocabulary[_END]]
      model = models.BPE(
        vocabulary, merges, end_of_word_suffix="</w>", unk_token=_END
      )
    except Exception as error:
      # The library raises bare Exception for merges of unknown words.
      raise InputError(
        f"{path / VOCABULARY} and {MERGES} are not CLIP's ({error!r}): the "
        f"first maps tokens to ids, {_START} and {_END} among them; the "
        "second has a pair of tokens a line."
      ) from error
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
    start, end = self._ends
    self._model.post_processor = processors.TemplateProcessing(
      single=f"{_START} $A {_END}",
      special_tokens=[(_START, start), (_END, end)],
    )
    self._model.add_special_tokens([_START, _END])

  def encode(
    self, strings: Sequence[str], length: int
  ) -> Int32[np.ndarray, "n length"]:
    """Ids of each string between start and end, cut to `length`.

    What is left of a row holds the end's id.
    """
    end = self._ends[1]
    ids = np.full((len(strings), length), end, np.int32)
    for row, found in zip(
      ids, self._model.encode_batch(list(strings)), strict=True
    ):
      kept = found.ids[:length]
      row[: len(kept)] = kept
    # A text that is cut ends all the same.
    ids[:, -1] = end
    return ids


def _read_merges(path: pathlib.Path) -> list[tuple[str, str]]:
  """The pairs of a file, in their order; the first line may be a comment."""
  lines = path.read_text("utf-8").splitlines()
  pairs = [line.split() for line in lines if not line.startswith("#version")]
  return [(first, second) for first, second in filter(None, pairs)]
