"""SentencePiece tokenizer, read from a `*.model` file."""

from collections.abc import Sequence

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from mtv_jax.data.tokenizers.base import (
  Tokenizer,
  add_special_tokens,
  check_ids,
)
from mtv_jax.utils.errors import InputError, printable


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model, padded with its end-of-sequence id as SigLIP is.

  Equal to the `SiglipTokenizer` of `transformers` except for the cleaning.

  Args:
    path: the model file.
    clean: see `Tokenizer`.

  Raises:
    InputError: not a SentencePiece model, or one without an end of sequence.
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
    if not 0 <= self.eos_id < self.vocab_size:
      raise InputError(
        f"{path} has no end-of-sequence piece; train it with --eos_id set."
      )

  def _ids(self, text: str, length: int) -> Sequence[int]:
    return [*self._model.encode(text)[: length - 1], self.eos_id]

  def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
    # Also of models that have no `to_model`.
    return [self._model.decode(list(row)) for row in rows]

  def to_model(self) -> tokenizers.Tokenizer:
    """A unigram model; raises InputError for other kinds."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(self._model.serialized_model_proto())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.UNIGRAM:
      kind = trainer.ModelType.Name(trainer.model_type)
      raise InputError(
        f"{self.path} is a SentencePiece model of kind {kind}; only UNIGRAM"
        " ones have a tokenizer.json. Train with the tokenizer.json of the same"
        " tokenizer instead (model.text.tokenizer)."
      )
    for field in ("eos_id", "unk_id"):
      if not 0 <= getattr(trainer, field) < len(proto.pieces):
        raise InputError(
          f"{self.path}: its {field} is {getattr(trainer, field)}, of"
          f" {len(proto.pieces)} pieces."
        )
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    model = tokenizers.Tokenizer(
      models.Unigram(
        pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback
      )
    )
    steps = []
    if rules.precompiled_charsmap:
      steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
      steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    scheme = "always" if rules.add_dummy_prefix else "never"
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    model.decoder = decoders.Metaspace(prepend_scheme=scheme)
    eos, unknown = pieces[trainer.eos_id][0], pieces[trainer.unk_id][0]
    add_special_tokens(model, (eos, unknown), eos, trainer.eos_id)
    model.normalizer = normalizers.Sequence(steps)
    return model
