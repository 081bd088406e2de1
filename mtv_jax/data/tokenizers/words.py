"""Word tokenizer for the built-in scenes."""

from collections.abc import Sequence

import tokenizers
from tokenizers import models, pre_tokenizers

from mtv_jax.data.tokenizers.base import Tokenizer, add_special_tokens

_SPECIAL = ("<pad>", "</s>", "<unk>")
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


class SceneWordTokenizer(Tokenizer):
  """One token per word of the built-in scenes; drops commas and colons.

  `<pad>` is 0, `</s>` is 1, and unknown words are `<unk>`, 2.
  """

  kind = "words"
  vocab_size, pad_id, eos_id = len(_SPECIAL) + len(_WORDS), 0, 1
  _table = {word: len(_SPECIAL) + i for i, word in enumerate(_WORDS)}

  def _tokenize(self, text: str, length: int) -> tuple[Sequence[int], bool]:
    text = self.clean_text(text)
    text.encode()  # Raises UnicodeError, like `ByteTokenizer`.
    words = text.replace(",", " ").replace(":", " ").split()
    unknown = _SPECIAL.index("<unk>")
    ids = [self._table.get(word, unknown) for word in words[: length - 1]]
    return [*ids, self.eos_id], len(words) >= length

  def to_hf_tokenizer(self) -> tokenizers.Tokenizer:
    vocabulary = {name: i for i, name in enumerate(_SPECIAL)} | self._table
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex("[,:]"), "removed"),
        pre_tokenizers.WhitespaceSplit(),
      ]
    )
    add_special_tokens(model, ("<pad>", "</s>"), "</s>", self.eos_id)
    return model
