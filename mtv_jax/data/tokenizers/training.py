"""SentencePiece models trained from the captions of a run's data."""

import io
import itertools
import re
from collections.abc import Iterable

import sentencepiece

from mtv_jax.data.tokenizers.builtin import ByteTokenizer
from mtv_jax.utils.errors import ConfigError, printable

# Ids of T5's vocabularies, one of which is SigLIP's c4_en.
_IDS = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def train_sentencepiece(texts: Iterable[str], size: int, clean: str) -> bytes:
  """Trains a unigram model of `size` pieces on cleaned texts.

  Like T5's vocabularies, it pads with id 0, ends texts with 1 and has 2 for
  unknown characters. Equal texts in equal order train equal models.

  Raises ConfigError if the texts yield fewer pieces, or need more.
  """
  cleaner = ByteTokenizer(None, clean)  # Any tokenizer cleans texts equally.
  file, where = io.BytesIO(), f"tokenizer=train:{size}"
  cleaned = (cleaner.clean_text(t) for t in texts if not cleaner.is_blank(t))
  if (first_text := next(cleaned, None)) is None:
    raise ConfigError(f"{where}: data.train has no captions to train on.")
  cleaned = itertools.chain([first_text], cleaned)
  options = dict(vocab_size=size, hard_vocab_limit=False, minloglevel=2, **_IDS)
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=cleaned, model_writer=file, **options
    )
  except RuntimeError as error:
    reason = printable(error)
    if match := re.search(r"\d+ vs (\d+)", reason):
      reason = f"the characters of the captions need {match[1]} pieces; set"
      reason += f" tokenizer=train:{match[1]} or more"
    raise ConfigError(f"{where}: {reason}.") from error
  data = file.getvalue()
  model = sentencepiece.SentencePieceProcessor(model_proto=data)
  if (num_pieces := model.vocab_size()) < size:
    raise ConfigError(
      f"{where}: the captions of data.train yield only {num_pieces} pieces."
      f" Set tokenizer=train:{num_pieces} or fewer, or add captions."
    )
  return data
