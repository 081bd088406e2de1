"""Conversations about images as token ids, with the answers marked.

A template formats questions and answers, as in LLaVA (Liu et al. 2023) and its
language models. Each piece is tokenized separately, so that an answer's tokens
don't depend on what follows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mtv_jax.config.op_strings import build_op, parse_ops
from mtv_jax.config.options import PositiveInt
from mtv_jax.data.ops import HostOp
from mtv_jax.data.records import BadRecord, Record, count_text
from mtv_jax.data.tokenizers import Tokenizer, build_tokenizer
from mtv_jax.data.tokenizers.base import MAX_CHARACTERS
from mtv_jax.utils.errors import InputError

IMAGE = "<image>"
IMAGE_ID = -1  # Negative ids stand for the image in the language model.


@dataclasses.dataclass(frozen=True)
class Template:
  """Text around the questions and answers of a conversation."""

  question: str  # `{}` is the question.
  answer: str = "{}"
  end: str | None = None  # Ends an answer; None: the tokenizer's end of text.
  separator: str = ""  # Precedes each question but the first.
  system: str = ""  # Precedes the first question.


_SYSTEM = (
  "A chat between a curious user and an artificial intelligence assistant. The "
  "assistant gives helpful, detailed, and polite answers to the user's "
  "questions. "
)
TEMPLATES = {
  # LLaVA's first stage: the image, then the answer; questions are left out.
  "plain": Template("", end="\n"),
  "lines": Template("{}\n"),  # For language models trained from scratch.
  "vicuna": Template("USER: {} ASSISTANT:", " {}", system=_SYSTEM),
  # Qwen2.5 and SmolLM2.
  "chatml": Template(
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    separator="\n",
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
  ),
  "llama3": Template(
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
  ),
}


@dataclasses.dataclass(frozen=True)
class ConversationOp(HostOp):
  """Token ids of a conversation, and whether each belongs to an answer.

  `IMAGE_ID` stands for the image. An answer includes its end. For a record with
  captions instead of a conversation, one caption is the answer to the image
  alone. A record without either becomes a row of padding.
  """

  length: PositiveInt
  tokenizer: str = "bytes"  # See `build_tokenizer`.
  template: Literal[tuple(TEMPLATES)] = "plain"

  random = True
  is_optional = True
  any_record_field = frozenset(["conversation", "captions"])
  batch_fields = {
    "conversation": (("length",), np.int32),
    "conversation_answer": (("length",), np.bool_),
  }

  @functools.cached_property
  def text(self) -> ConversationText:
    """The tokenizer with the template; reads the tokenizer's file."""
    tokenizer = build_tokenizer(self.tokenizer, clean="none")
    return ConversationText(tokenizer, self.template)

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    key, turns = record["key"], record.get("conversation")
    if turns is None and (captions := record.get("captions")):
      turns = [IMAGE, captions[int(rng.integers(len(captions)))]]
    ids = np.full(self.length, self.text.tokenizer.pad_id, np.int32)
    mask = np.zeros(self.length, np.bool_)
    fields = {"conversation": ids, "conversation_answer": mask}
    if not turns:
      return record | fields
    if sum(map(len, turns)) > MAX_CHARACTERS:
      reason = f"a conversation has more than {MAX_CHARACTERS:,} characters"
      raise BadRecord(key, reason)
    tokens, is_answer = self.text.encode(turns, key=key)
    count = min(len(tokens), self.length)
    ids[:count], mask[:count] = tokens[:count], is_answer[:count]
    if not mask.any():
      reason = f"its first answer is not within {self.length} tokens"
      raise BadRecord(key, reason)
    has_unknown = self.text.tokenizer.has_unknown(ids[mask])
    count_text(record, "conversations", len(tokens) > count, has_unknown)
    return record | fields


class ConversationText:
  """A tokenizer with a conversation template."""

  def __init__(self, tokenizer: Tokenizer, template: str):
    self.tokenizer, self.template = tokenizer, TEMPLATES[template]
    model = tokenizer.to_hf_tokenizer()
    model.no_padding()
    model.no_truncation()
    self._model: Any = model
    # Special tokens before a text, such as Llama's.
    start = model.encode("").ids
    has_end = start and start[-1] == tokenizer.eos_id
    self._start = start[:-1] if has_end else start
    end = self.template.end
    if end is not None:
      self._end = self._encode(end)
      is_unknown = tokenizer.has_unknown(np.array(self._end, np.int32))
      if end.startswith("<|") and (is_unknown or len(self._end) != 1):
        raise InputError(
          f"template={template!r} ends answers with {end!r}, which is not a "
          f"token of {tokenizer!r}. Choose one of {', '.join(TEMPLATES)}."
        )
    elif tokenizer.eos_id is None:
      raise InputError(f"{tokenizer!r} lacks an end-of-text token for answers.")
    else:
      self._end = [tokenizer.eos_id]
    if not self._end:
      raise InputError(
        f"template={template!r} ends answers with {end!r}, which {tokenizer!r} "
        "drops. Set another template, such as 'lines'."
      )

  @property
  def stop_id(self) -> int:
    """The last token of every answer."""
    return self._end[-1]

  def encode(
    self, turns: Sequence[str], *, key: str = "conversation"
  ) -> tuple[list[int], list[bool]]:
    """Returns ids of alternating questions and answers, and an answer mask.

    Raises BadRecord for text that is not Unicode, and for several images.
    """
    tokens, is_answer = self._encode_start(), []
    is_answer += [False] * len(tokens)
    for i, text in enumerate(turns):
      if i % 2:
        ids = self._encode(self.template.answer.format(text), key) + self._end
      else:
        between = self._encode(self.template.separator) if i else []
        ids = between + self._encode_question(text, key)
      tokens += ids
      is_answer += [bool(i % 2)] * len(ids)
    if tokens.count(IMAGE_ID) > 1:
      raise BadRecord(key, f"it has {IMAGE} several times; expected once")
    return tokens, is_answer

  def encode_prompt(self, question: str) -> list[int]:
    """Ids of a question, up to where its answer starts."""
    return self._encode_start() + self._encode_question(question, "question")

  def decode(self, rows: np.ndarray | Sequence[Sequence[int]]) -> list[str]:
    """Decodes answers to texts, up to their end token."""
    cut = []
    for row in rows:
      ids = list(map(int, row))
      cut.append(ids[: ids.index(self.stop_id)] if self.stop_id in ids else ids)
    return [text.strip() for text in self.tokenizer.decode(cut)]

  def _encode_start(self) -> list[int]:
    return [*self._start, *self._encode(self.template.system)]

  def _encode_question(self, text: str, key: str) -> list[int]:
    """A question's ids; its image token comes first, as in LLaVA."""
    count, text = text.count(IMAGE), text.replace(IMAGE, "").strip()
    if not self.template.question:
      return [IMAGE_ID] * count
    before, after = self.template.question.split("{}")
    if not count:
      return self._encode(before + text + after, key)
    image_ids = [IMAGE_ID] * count
    text_ids = self._encode(f"\n{text}{after}", key)
    return [*self._encode(before, key), *image_ids, *text_ids]

  def _encode(self, text: str, key: str = "") -> list[int]:
    try:
      text.encode()
    except UnicodeError as error:
      raise BadRecord(key, f"a text is not Unicode ({error})") from error
    return self._model.encode(text, add_special_tokens=False).ids

  def __reduce__(self) -> tuple:
    names = {template: name for name, template in TEMPLATES.items()}
    return type(self), (self.tokenizer, names[self.template])


def find_op(text: str) -> ConversationOp | None:
  """Returns the op `conversation` of an ops string, or None."""
  for op in parse_ops(text):
    if op.name == "conversation":
      return build_op(op, {op.name: ConversationOp}, "data op")
  return None
