"""Hugging Face fast tokenizer, read from a `tokenizer.json`."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from mtv_jax.config import foreign
from mtv_jax.data.tokenizers.base import Tokenizer, add_cleaning, check_ids
from mtv_jax.utils.errors import InputError, printable

# End-of-sequence and padding tokens of common vocabularies, most specific
# first; used only if the files don't name them.
_EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]")
_PAD_NAMES = ("<pad>", "[PAD]", *_EOS_NAMES)


class HuggingFaceTokenizer(Tokenizer):
  """A `tokenizer.json`, whose post-processor adds the special tokens.

  A tokenizer_config.json next to it names them.
  """

  kind = "json"

  def __init__(self, path: str, clean: str):
    super().__init__(path, clean)
    try:
      self._text = Path(path).read_text(encoding="utf-8")
      model = tokenizers.Tokenizer.from_str(self._text)
      # Encode now, so that an unusable model fails here and not later.
      model.encode("a")
    except (OSError, MemoryError, KeyboardInterrupt, SystemExit):
      raise
    except BaseException as error:
      # The library raises a bare Exception if it can't parse a file, and its
      # panics derive from BaseException.
      raise InputError(
        f"{path} is not a tokenizer.json ({printable(error)}); expected the"
        " file that `tokenizers` and fast tokenizers of `transformers` save."
      ) from error
    vocabulary = model.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values(), default=-1) + 1
    check_ids(path, self.vocab_size)
    names = _read_special_tokens(Path(path).with_name("tokenizer_config.json"))
    self.eos_id = _find_id(vocabulary, names.get("eos_token"), _EOS_NAMES)
    padding = model.padding or {}
    pad_name = names.get("pad_token") or padding.get("pad_token")
    self.pad_id = _find_id(vocabulary, pad_name, _PAD_NAMES)
    if self.pad_id is None:
      raise InputError(
        f"{path} names no padding token, and lacks {', '.join(_PAD_NAMES)}. Add"
        " pad_token to tokenizer_config.json beside it."
      )
    unk_id = _find_unk_id(self._text, vocabulary)
    # CLIP's unknown token is its end of text: its pieces cover every byte.
    self.unk_id = None if unk_id in (self.eos_id, self.pad_id) else unk_id

  @functools.lru_cache(maxsize=8)  # noqa: B019 - few tokenizers, long-lived
  def _build_model(self, length: int) -> tokenizers.Tokenizer:
    # Truncation is state of the object, which threads with different lengths
    # can't share.
    model = tokenizers.Tokenizer.from_str(self._text)
    add_cleaning(model, self.clean)
    model.no_padding()
    model.enable_truncation(length)
    return model

  def _tokenize(self, text: str, length: int) -> tuple[Sequence[int], bool]:
    encoding = self._build_model(length).encode(text)
    return encoding.ids, bool(encoding.overflowing)

  def to_hf_tokenizer(self) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(self._text)


def _read_special_tokens(path: Path) -> dict[str, str]:
  content = foreign.read_object(path)
  names = {}
  with foreign.errors_of(path):
    for key in ("eos_token", "pad_token"):
      value = foreign.read_field(content, key, str | dict, default=None)
      if isinstance(value, dict):
        value = foreign.read_field(value, "content", str, where=f"{key}.")
      if value is not None:
        names[key] = value
  return names


def _find_unk_id(text: str, vocabulary: dict[str, int]) -> int | None:
  """Finds the id of unknown words in the content of a tokenizer.json."""
  model = json.loads(text)["model"]
  unk_id = vocabulary.get(model.get("unk_token"))
  return model.get("unk_id") if unk_id is None else unk_id


def _find_id(
  vocabulary: dict[str, int], name: str | None, names: Sequence[str]
) -> int | None:
  """Finds the id of `name`, else of the first known one of `names`."""
  if name in vocabulary:
    return vocabulary[name]
  return next((vocabulary[n] for n in names if n in vocabulary), None)
