"""Our tokenizers, cleaning included, as a Hugging Face `tokenizer.json`.

Cleaning becomes normalizers in front of the file's own, so that whoever opens
the exported folder gets our ids from raw text without our code.
"""

import re
import string

from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)


def from_bytes(clean: str) -> Tokenizer:
  """UTF-8 bytes: `<pad>` 0, `</s>` 1, byte b is b + 2."""
  vocabulary = {"<pad>": 0, "</s>": 1}
  vocabulary |= {name: byte + 2 for byte, name in enumerate(_byte_names())}
  # A vocabulary of single bytes without merges leaves every byte its own.
  tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  if cleaners := _cleaners(clean):
    tokenizer.normalizer = normalizers.Sequence(cleaners)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([_special("<pad>"), _special("</s>")])
  _end_with(tokenizer, "</s>", 1)
  return tokenizer


def from_sentencepiece(model: bytes, clean: str, path: str) -> Tokenizer:
  """A unigram model, with its own normalization after the cleaning.

  Args:
    model: the bytes of the model file.
    clean: what happens to a text first.
    path: of that file, for errors.

  Raises:
    ValueError: a model of another kind than unigram.
  """
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(model)
  trainer, rules = proto.trainer_spec, proto.normalizer_spec
  if trainer.model_type != trainer.UNIGRAM:
    kind = trainer.ModelType.Name(trainer.model_type)
    raise ValueError(
      f"{path} is a SentencePiece model of kind {kind}; only UNIGRAM ones can"
      " be written as a tokenizer.json. Train with the tokenizer.json of the"
      " same tokenizer instead (model.text.tokenizer)."
    )
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  tokenizer = Tokenizer(
    models.Unigram(
      pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback
    )
  )
  steps = _cleaners(clean)
  if rules.precompiled_charsmap:
    steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
  if rules.remove_extra_whitespaces:
    steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
  tokenizer.normalizer = normalizers.Sequence(steps)
  scheme = "always" if rules.add_dummy_prefix else "never"
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
  tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
  eos, unknown = pieces[trainer.eos_id][0], pieces[trainer.unk_id][0]
  tokenizer.add_special_tokens([_special(eos), _special(unknown)])
  _end_with(tokenizer, eos, trainer.eos_id)
  return tokenizer


def from_json(text: str, clean: str) -> Tokenizer:
  """A tokenizer.json with the cleaning before its own normalizer."""
  tokenizer = Tokenizer.from_str(text)
  if cleaners := _cleaners(clean):
    own = [tokenizer.normalizer] if tokenizer.normalizer else []
    tokenizer.normalizer = normalizers.Sequence(cleaners + own)
  return tokenizer


def _cleaners(clean: str) -> list[normalizers.Normalizer]:
  """`tokenizers.canonicalize` and its kin, as normalizers."""
  if clean == "none":
    return []
  if clean == "lower":
    return [normalizers.Lowercase()]
  return [
    normalizers.Replace("_", " "),
    normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
    normalizers.Lowercase(),
    normalizers.Replace(Regex(r"\s+"), " "),
    normalizers.Strip(),
  ]


def _special(name: str) -> AddedToken:
  return AddedToken(name, special=True, normalized=False)


def _end_with(tokenizer: Tokenizer, eos: str, eos_id: int) -> None:
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"$A {eos}",
    pair=f"$A {eos} $B {eos}",
    special_tokens=[(eos, eos_id)],
  )


def _byte_names() -> list[str]:
  """The printable character that stands for each byte in byte-level BPE.

  Printable Latin-1 stands for itself; the others follow from U+0100 on
  (Radford et al. 2019, GPT-2).
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  names = {byte: chr(byte) for byte in printable}
  names |= {byte: chr(256 + i) for i, byte in enumerate(others)}
  return [names[byte] for byte in range(256)]
