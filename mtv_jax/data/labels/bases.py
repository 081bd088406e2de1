"""The sources that labels are made for: tars and ArrayRecord files."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtv_jax.data.labels import label_sets
from mtv_jax.data.records import BadRecord, Record
from mtv_jax.data.sources.array_record import ArrayRecordSource
from mtv_jax.data.sources.webdataset import WebDatasetSource


def open_base(
  paths: Sequence[str],
  *,
  index_dir: str | os.PathLike | None = None,
  captions: str = "ignored",
) -> WebDatasetSource | ArrayRecordSource:
  """The source of some shards, all of whose pictures have a number.

  A label set that was made for it fits a source that takes all pictures, and
  one that leaves out those without a caption, too.

  Args:
    paths: of tars or of ArrayRecord files; ranges and globs.
    index_dir: of the tars' indices, beside them by default.
    captions: of tars: "ignored", or "optional" where they are of use.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: they are no shards, or hold no record.
  """
  if all(path.endswith(".array_record") for path in paths):
    return ArrayRecordSource(paths)
  return WebDatasetSource(paths, index_dir=index_dir, captions=captions)


def meta_of(base: Any, shard: int) -> Callable[[int], Mapping[str, Any]]:
  """What is known of each record: its .json, or its line beside the shard."""
  if hasattr(base, "meta"):
    return base.meta
  known = _lines(base, shard)

  def meta(number: int) -> Mapping[str, Any]:
    try:
      key = base[number]["key"]
    except BadRecord as error:
      key = error.key
    return known.get(key, {"key": key})

  return meta


def record_of(base: Any, shard: int) -> Callable[[int], Record]:
  """Reads a record, with what is known of it as its `meta`, in one go."""
  if hasattr(base, "record_and_meta"):
    return base.record_and_meta
  known = _lines(base, shard)

  def record(number: int) -> Record:
    found = base[number]
    return found | {"meta": known.get(found["key"], {"key": found["key"]})}

  return record


def _lines(base: Any, shard: int) -> dict[str, Mapping[str, Any]]:
  """The lines of NAME_meta.jsonl beside a shard, by key."""
  file = base.files[shard]
  file = file.with_name(label_sets.stem(file) + "_meta.jsonl")
  # Not splitlines, which also cuts where a caption holds U+2028.
  lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
  found = {}
  for number, line in enumerate(lines, 1):
    if not line:
      continue
    try:
      meta = json.loads(line)
      found[meta["key"]] = meta
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f"{file}: line {number} is no JSON object with a 'key'"
        f" ({type(error).__name__}: {error}). Copy the file again, or remove it"
        " if nothing of it is needed."
      ) from error
  return found
