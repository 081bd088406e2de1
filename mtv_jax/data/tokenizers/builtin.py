"""Built-in tokenizers: UTF-8 bytes, and words of the built-in scenes."""

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mtv_jax.data.tokenizers.base import Tokenizer, add_special_tokens

_SPECIALS = ("<pad>", "</s>", "<unk>")
# Embedding rows in the recipes; the spare ones are for future words.
EMBEDDING_ROWS = 144
# Words of the scenes' captions, phrases and prompts. Append new words only:
# checkpoints have a row for each.
_WORDS = """
a an the in on of to its it at with and than is are there no one two three four
five above arrow arrows back ball balls behind below beside big black blue brick
brown bucket buckets carpet checkered closer cloudy cone cones cross crosses
cube cubes cylinder cylinders dots dotted farther fish floor flower flowers
front gem gems grass gravel green grey heart hearts hedge here hourglass
hourglasses house houses image large left little marble moon moons mushroom
mushrooms object objects orange panels photo picture pink purple pyramid
pyramids red right ring rings sand scene showing shows sky small snow snowman
snowmen speckled standing star stars striped stripes that tiled top tree trees
turquoise under view wall wallpaper white wooden woven yellow zigzag zigzags
""".split()  # noqa: SIM905 - a list would take four times the lines
# Further words of the questions about scenes.
_QUESTION_WORDS = (
  *("what", "colour", "how", "many", "does", "look"),
  *("larger", "smaller", "or", "yes", "zero"),
)


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
  other_bytes = [byte for byte in range(256) if byte not in printable]
  names = {byte: chr(byte) for byte in printable}
  names |= {byte: chr(256 + i) for i, byte in enumerate(other_bytes)}
  return [names[byte] for byte in range(256)]


class SceneWordTokenizer(Tokenizer):
  """One token per word of the built-in scenes; drops commas and colons.

  `<pad>` is 0, `</s>` is 1, and unknown words are `<unk>`, 2.
  """

  kind = "words"
  vocab_size, pad_id, eos_id = len(_SPECIALS) + len(_WORDS), 0, 1
  unk_id = _SPECIALS.index("<unk>")
  _table = {word: len(_SPECIALS) + i for i, word in enumerate(_WORDS)}
  _dropped = ",:"

  def _tokenize(self, text: str, length: int) -> tuple[Sequence[int], bool]:
    text = self.clean_text(text)
    text.encode()  # Raises UnicodeError, like `ByteTokenizer`.
    words = text.translate(dict.fromkeys(map(ord, self._dropped), " ")).split()
    ids = [self._table.get(word, self.unk_id) for word in words[: length - 1]]
    return [*ids, self.eos_id], len(words) >= length

  def to_hf_tokenizer(self) -> tokenizers.Tokenizer:
    vocabulary = {name: i for i, name in enumerate(_SPECIALS)} | self._table
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex(f"[{self._dropped}]"), "removed"),
        pre_tokenizers.WhitespaceSplit(),
      ]
    )
    add_special_tokens(model, ("<pad>", "</s>"), "</s>", self.eos_id)
    return model


class QuestionWordTokenizer(SceneWordTokenizer):
  """Also has the words of questions about scenes; drops their "?"."""

  kind = "question_words"
  vocab_size = SceneWordTokenizer.vocab_size + len(_QUESTION_WORDS)
  _table = {
    word: len(_SPECIALS) + i
    for i, word in enumerate((*_WORDS, *_QUESTION_WORDS))
  }
  _dropped = ",:?"
