"""UTF-8 byte tokenizer."""

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mtv_jax.data.tokenizers.base import Tokenizer, add_special_tokens


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes: `<pad>` is 0, `</s>` is 1, byte b is b + 2."""

  kind = "bytes"
  vocab_size, pad_id, eos_id = 258, 0, 1

  def _tokenize(self, text: str, length: int) -> tuple[Sequence[int], bool]:
    data = self.clean_text(text).encode()
    ids = [*(byte + 2 for byte in data[: length - 1]), self.eos_id]
    return ids, len(data) >= length

  def to_hf_tokenizer(self) -> tokenizers.Tokenizer:
    vocabulary = {"<pad>": 0, "</s>": 1}
    vocabulary |= {name: byte + 2 for byte, name in enumerate(_byte_names())}
    # Without merges, BPE over single bytes makes every byte a token.
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    model.decoder = decoders.ByteLevel()
    add_special_tokens(model, ("<pad>", "</s>"), "</s>", self.eos_id)
    return model


def _byte_names() -> list[str]:
  """Printable character for each byte in byte-level BPE.

  Printable Latin-1 characters stay as they are; the remaining bytes are
  numbered from U+0100 (Radford et al. 2019, GPT-2).
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  names = {byte: chr(byte) for byte in printable}
  names |= {byte: chr(256 + i) for i, byte in enumerate(others)}
  return [names[byte] for byte in range(256)]
