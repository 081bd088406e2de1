"""Tokenizers as released encoders have them, and texts to compare ids on."""

import io

import numpy as np
import sentencepiece

CORPUS = [
  "a photo of a red cat on the sofa.",
  "Two dogs, 12 birds and 345 fish!",
  "un caf\u00e9 cr\u00e8me \u00e0 Paris",
  "the quick brown fox jumps over the lazy dog",
  "line one\nline two, don't stop  believing",
]
TEXTS = [
  "a photo of a cat",
  "A PHOTO OF A CAT",
  "Caf\u00e9 cr\u00e8me, \u00c0\u00c9",
  "cafe\u0301",
  "\u0130stanbul \u1e9e Stra\u00dfe",
  "\u03a3\u0391\u03a3 \u039f\u0394\u039f\u03a3",
  "\U0001f408 cat \U0001f469\u200d\U0001f680",
  "two  spaces   three    four",
  "  lead and trail  ",
  "one\ntwo\n\nthree\n",
  "tab\there",
  "",
  " ",
  "12 345 6789",
  "\u65e5\u672c\u8a9e \u0442\u0435\u043a\u0441\u0442 \u0639\u0631\u0628\u0649",
  "\u2581 meta \u2581\u2581x",
  "<eos> a </s> <pad> <bos> <unk>",
  "<EOS> a </S> <Pad> <BOS> <UNK> <MASK>",
  "a <|endoftext|> b <|ENDOFTEXT|> <|StartOfText|>",
  "\ufb01ne \u2460 \uff12 \u2122",
  "a\u00a0b\u200bc\u3000d",
  "long " * 100,
  "x" * 300,
  "don't_!",
  "<table> <TABLE> <0x41> <0X41>",
  "a\x00b",
  "\ufeffbom",
]
# Kinds of SentencePiece models, named after a user.
_BPE = dict(model_type="bpe", vocab_size=400, byte_fallback=True, pad_id=0)
GEMMA = dict(
  _BPE, split_digits=True, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
  eos_piece="<eos>", bos_piece="<bos>", add_dummy_prefix=False,
  remove_extra_whitespaces=False, normalization_rule_name="identity",
  allow_whitespace_only_pieces=True,
  user_defined_symbols=[
    "<mask>", "\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "<table>"
  ],
)  # fmt: skip
TIPS = dict(_BPE, eos_id=1, unk_id=2, bos_id=3)


def train_sentencepiece(path, **options):
  """Writes a SentencePiece model of `CORPUS`."""
  content = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS * 4),
    model_writer=content,
    minloglevel=2,
    hard_vocab_limit=False,
    **options,
  )
  path.write_bytes(content.getvalue())


def assert_equal_ids(ours, theirs, length, texts=TEXTS):
  """Compares with a tokenizer or a processor of `transformers`."""
  want = theirs(
    text=texts, padding="max_length", truncation=True, max_length=length
  )["input_ids"]
  got = ours.encode(texts, length)
  for text, *rows in zip(texts, got, want, strict=True):
    np.testing.assert_array_equal(*rows, err_msg=repr(text))
