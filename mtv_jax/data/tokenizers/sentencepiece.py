"""SentencePiece tokenizer, read from a `*.model` file."""

import io
import itertools
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
  AddedToken,
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from mtv_jax.data.tokenizers.base import (
  Tokenizer,
  add_special_tokens,
  check_ids,
  write_files,
)
from mtv_jax.data.tokenizers.builtin import ByteTokenizer
from mtv_jax.utils.errors import ConfigError, InputError, printable


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model, padded with the end-of-sequence id like SigLIP.

  Equal to `SiglipTokenizer` of `transformers`, except for cleaning.
  """

  kind = "sentencepiece"

  def __init__(self, path: str, clean: str):
    super().__init__(path, clean)
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
      if getattr(error, "errno", None):
        raise
      raise InputError(
        f"{path} is not a SentencePiece model ({printable(error)}); expected"
        " the binary file that its trainer writes, often called spiece.model."
      ) from error
    self.vocab_size = self._model.vocab_size()
    check_ids(path, self.vocab_size)
    self.pad_id = self.eos_id = self._model.eos_id()
    self.unk_id = self._model.unk_id()
    if not 0 <= self.eos_id < self.vocab_size:
      raise InputError(
        f"{path} has no end of sequence; train it with --eos_id."
      )

  def _tokenize(self, text: str, length: int) -> tuple[Sequence[int], bool]:
    ids = self._model.encode(self.clean_text(text))
    return [*ids[: length - 1], self.eos_id], len(ids) >= length

  def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
    # Not through `to_hf_tokenizer`, which supports only some model types.
    return [self._model.decode(list(row)) for row in rows]

  def to_hf_tokenizer(self) -> tokenizers.Tokenizer:
    """Converts a unigram or BPE model; raises InputError for other types."""
    proto = self._read_proto()
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    model = tokenizers.Tokenizer(self._build_pieces(proto))
    steps = []
    if rules.precompiled_charsmap:
      steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
      steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    scheme = "always" if rules.add_dummy_prefix else "never"
    # BPE pieces may span several spaces.
    space = {"prepend_scheme": scheme, "split": _is_unigram(trainer)}
    model.pre_tokenizer = pre_tokenizers.Metaspace(**space)
    model.decoder = decoders.Metaspace(**space)
    if trainer.byte_fallback:
      model.decoder = decoders.Sequence(
        [model.decoder, decoders.ByteFallback(), decoders.Fuse()]
      )
    eos, unknown = (
      proto.pieces[i].piece for i in (trainer.eos_id, trainer.unk_id)
    )
    add_special_tokens(model, (eos, unknown), eos, trainer.eos_id)
    model.normalizer = normalizers.Sequence(steps)
    return model

  def _read_proto(self) -> sentencepiece_model_pb2.ModelProto:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(self._model.serialized_model_proto())
    trainer = proto.trainer_spec
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
      kind = trainer.ModelType.Name(trainer.model_type)
      raise InputError(
        f"{self.path} is a SentencePiece model of kind {kind}; only UNIGRAM and"
        " BPE ones have a tokenizer.json. Set model.text.tokenizer to one."
      )
    for field in ("eos_id", "unk_id"):
      if not 0 <= getattr(trainer, field) < len(proto.pieces):
        problem = f"{field} is {getattr(trainer, field)}"
        raise InputError(
          f"{self.path}: {problem}, with {len(proto.pieces)} pieces."
        )
    return proto

  def _build_pieces(self, proto: sentencepiece_model_pb2.ModelProto) -> Any:
    trainer = proto.trainer_spec
    fallback = {"byte_fallback": trainer.byte_fallback}
    if _is_unigram(trainer):
      pieces = [(piece.piece, piece.score) for piece in proto.pieces]
      return models.Unigram(pieces, unk_id=trainer.unk_id, **fallback)
    return models.BPE(
      {piece.piece: i for i, piece in enumerate(proto.pieces)},
      _list_merges(proto),
      unk_token=proto.pieces[trainer.unk_id].piece,
      fuse_unk=True,
      **fallback,
    )

  def write_folder(self, folder: pathlib.Path, *, add_end: bool) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`.

    Follows how `transformers` reads a `tokenizer.model`: the model's own
    padding piece pads, and its control and user-defined pieces are matched in
    texts. With `add_end`, texts end with the end-of-sequence token.
    """
    model, proto = self.to_hf_tokenizer(), self._read_proto()
    pad_id = proto.trainer_spec.pad_id
    if not 0 <= pad_id < len(proto.pieces):
      raise InputError(
        f"{self.path} has no padding piece; train with --pad_id."
      )
    kinds = proto.SentencePiece
    for kind, add_tokens in (
      (kinds.CONTROL, model.add_special_tokens),
      (kinds.USER_DEFINED, model.add_tokens),
    ):
      names = [piece.piece for piece in proto.pieces if piece.type == kind]
      add_tokens([AddedToken(n, normalized=False) for n in names])
    if not add_end:
      model.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
      )
    config = {"pad_token": proto.pieces[pad_id].piece}
    if add_end:
      config["eos_token"] = proto.pieces[self.eos_id].piece
    write_files(folder, model, config)


def _is_unigram(trainer: sentencepiece_model_pb2.TrainerSpec) -> bool:
  return trainer.model_type == trainer.UNIGRAM


def _list_merges(
  proto: sentencepiece_model_pb2.ModelProto,
) -> list[tuple[str, str]]:
  """Lists pairs of pieces that BPE merges, highest score first."""
  kinds = proto.SentencePiece
  pieces = {
    piece.piece: piece.score
    for piece in proto.pieces
    if piece.type in (kinds.NORMAL, kinds.USER_DEFINED)
  }
  merges = [
    (text[:i], text[i:])
    for text in sorted(pieces, key=pieces.__getitem__, reverse=True)
    for i in range(1, len(text))
  ]
  return [(a, b) for a, b in merges if a in pieces and b in pieces]


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
