"""Conversations about images, in LLaVA's JSON (Liu et al. 2023)."""

import json
import os
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.data.image_limits import MAX_BYTES
from mtv_jax.data.records import BadRecord, NoRecordsError, Record
from mtv_jax.data.sources import listings
from mtv_jax.data.sources.base import Source
from mtv_jax.utils.errors import InputError, MissingFileError, printable
from mtv_jax.utils.path import local_copy, refuse_remote

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
