"""Conversations about images as token ids, with the answers marked.

A template formats questions and answers, as in LLaVA (Liu et al. 2023) and its
language models. Each piece is tokenized separately, so that an answer's tokens
don't depend on what follows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.config.options import PositiveInt
from mtv_jax.data.image_limits import MAX_BYTES
from mtv_jax.data.ops import HostOp
from mtv_jax.data.records import BadRecord, NoRecordsError, Record, count_text
from mtv_jax.data.sources import listings
from mtv_jax.data.sources.base import Source
from mtv_jax.data.tokenizers import Tokenizer, build_tokenizer
from mtv_jax.data.tokenizers.base import MAX_CHARACTERS
from mtv_jax.utils.errors import InputError, MissingFileError, printable
from mtv_jax.utils.path import local_copy, refuse_remote

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


_ROLES = ("human", "gpt")  # Alternating.
# Stands in if a conversation has no image: no token attends to it.
_BLANK = np.full((8, 8, 3), 127, np.uint8)


class ConversationSource(Source):
  """A JSON list, or JSON lines, of conversations with at most one image.

  A row has `conversations`, turns `{from, value}` by human and gpt, and
  optionally `image`, a file name, and `id`. A malformed row is a bad record.

  Args:
    path: the JSON file.
    images: folder of the images; default: the file's folder.
    text_only: leaves out all images, to train a language model on the texts.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    text_only: bool = False,
  ):
    file = Path(local_copy(os.path.expanduser(path)))
    if images is not None:
      refuse_remote(images, "A folder of images", "Copy it.")
    self._images = Path(images if images is not None else file.parent)
    self._text_only = text_only
    self.name = printable(str(path))
    if not file.is_file():
      raise MissingFileError(f"There is no file of conversations {self.name}.")
    if not (text_only or self._images.is_dir()):
      name = printable(str(self._images))
      raise MissingFileError(f"There is no folder of images {name}.")
    rows = foreign.read_json_or_lines(file)
    if isinstance(rows, dict) and "conversations" in rows:  # A single line.
      rows = [rows]
    if not isinstance(rows, list):
      kind = type(rows).__name__
      raise InputError(
        f"{self.name} is a JSON {kind}; expected a list of rows."
      )
    if not rows:
      raise NoRecordsError(f"{self.name} has no conversations.")
    # One buffer, which workers receive faster than a million objects.
    data = [json.dumps(row).encode() for row in rows]
    self._ends = np.cumsum([*map(len, data)])
    self._data = np.frombuffer(b"".join(data), np.uint8)
    self.fields = frozenset(["key", "image", "conversation"])
    self.shards = np.array([len(rows)], np.int64)

  def _list_names(self) -> list[str]:
    return [f"{len(self._data)} bytes"]

  def _read_json_row(self, i: int) -> Any:
    start = self._ends[i - 1] if i else 0
    return json.loads(self._data[start : self._ends[i]].tobytes())

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record `i`; BadRecord if its row or its image is unusable."""
    _, i = self._locate(i)
    row = self._read_json_row(i)
    name = row.get("id", "") if isinstance(row, dict) else ""
    key = printable(f"{i}:{name}")
    try:
      turns, file = read_row(row)
    except InputError as error:
      raise BadRecord(key, str(error)) from error
    if self._text_only:
      turns = [text.replace("<image>", "").strip() for text in turns]
      return {"key": key, "image": _BLANK, "conversation": turns}
    image_count = sum(text.count("<image>") for text in turns[::2])
    if image_count and file is None:
      raise BadRecord(key, "it has <image> but names no image")
    if file is None:
      return {"key": key, "image": _BLANK, "conversation": turns}
    if not image_count:
      raise BadRecord(key, "it names an image but no question has <image>")
    try:
      path = foreign.resolve_name(self._images, file, where=self.name)
    except InputError as error:
      raise BadRecord(key, str(error)) from error
    image = listings.read_content(key, "image", path, limit=MAX_BYTES)
    return {"key": key, "image": image, "conversation": turns}

  def _metadata(self, i: int, key: str) -> dict[str, Any]:
    row = self._read_json_row(i)
    file = row.get("image") if isinstance(row, dict) else None
    return {"key": key} | ({"file_name": file} if file else {})


def read_row(row: Any) -> tuple[list[str], str | None]:
  """Returns alternating questions and answers, and the image's file name.

  Raises InputError for a malformed row.
  """
  fields = foreign.read_fields(row, {"image": str}, where="")
  turns = foreign.read_field(fields, "conversations", list)
  if len(turns) < 2 or len(turns) % 2:
    raise InputError(f"it has {len(turns)} turns; expected pairs")
  texts = []
  for i, turn in enumerate(turns):
    where = f"conversations[{i}]."
    fields = foreign.read_fields(turn, {"from": str, "value": str}, where=where)
    role = foreign.read_field(fields, "from", str, where=where)
    if role != _ROLES[i % 2]:
      raise InputError(f"{where}from is {role!r}; expected {_ROLES[i % 2]!r}")
    texts.append(foreign.read_field(fields, "value", str, where=where))
  return texts, row.get("image")
