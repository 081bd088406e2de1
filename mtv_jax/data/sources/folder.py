"""Image files with captions, from a folder or a listing."""

import collections
import logging
import os
from typing import Any, SupportsIndex

import numpy as np

from mtv_jax.data.image_limits import MAX_BYTES
from mtv_jax.data.records import NO_CAPTIONS_HINT, NoRecordsError, Record
from mtv_jax.data.sources import listings
from mtv_jax.data.sources.base import CaptionMode, Source
from mtv_jax.utils.errors import InputError, printable
from mtv_jax.utils.path import refuse_remote

log = logging.getLogger(__name__)


class FolderSource(Source):
  """Image files, read one by one, with captions from a listing.

  For local data sets of up to some hundred thousand files; larger ones read
  faster from shards (`mtv-jax make_shards` reads the same listings). A record's
  key is its file name relative to the folder.

  Args:
    path: a folder of images (and subfolders), with captions in a .txt or .json
      named like the image; or a listing: COCO captions (.json) or a table
      (.csv, .tsv, .parquet), see `listings.read`.
    images: folder of a listing's images; default: the listing's folder.
    image_column: a table's column of file names.
    caption_column: a table's column of captions.
    captions: "required" skips images without captions; "ignored" reads all
      images and no captions; "optional" reads all images, except those whose
      captions are unreadable.

  Raises:
    MissingFileError: the path or a listed file is missing.
    NoRecordsError: no usable image is listed.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    captions: CaptionMode = "required",
  ):
    refuse_remote(path, "A folder of images", "Write shards, or copy it.")
    path = os.path.expanduser(path)
    if images is not None and os.path.isdir(path):
      name = printable(path)
      raise InputError(f"{name} is a folder of images: leave out `images`.")
    if captions == "ignored" and os.path.isdir(path):
      all_examples = listings.list_images(path)
    else:
      columns = {"image_column": image_column, "caption_column": caption_column}
      all_examples = listings.read(path, images=images, **columns)
    usable = {""} if captions == "required" else {"", listings.NO_CAPTION}
    self._examples = [e for e in all_examples if e.problem in usable]
    self.name = printable(path)
    self._report_left_out([e for e in all_examples if e.problem not in usable])
    listings.require_images(self._examples)
    fields = ["key", "image"] + ["captions"] * (captions != "ignored")
    self.fields = frozenset(fields)
    # Files are not shards: block shuffling sees a single shard.
    self.shards = np.array([len(self._examples)], np.int64)

  def _report_left_out(self, examples: list[listings.Example]) -> None:
    counts = collections.Counter(e.problem for e in examples)
    reasons = "; ".join(f"{n} {reason}" for reason, n in counts.most_common(3))
    if not self._examples:
      raise NoRecordsError(
        f"{self.name} has no usable image ({reasons or 'no file'}). Expected"
        " images with a .txt or .json of the same name, or a listing."
        f" {NO_CAPTIONS_HINT}"
      )
    if examples:
      log.warning(
        f"{self.name}: left out {len(examples)} images ({reasons});"
        f" {len(self._examples)} remain."
      )

  def _list_names(self) -> list[str]:
    return [example.name for example in self._examples]

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record `i`; BadRecord if its file is missing or unreadable."""
    _, i = self._locate(i)
    example = self._examples[i]
    data = listings.read_content(
      example.name, "image", example.path, limit=MAX_BYTES
    )
    record: Record = {"key": example.name, "image": data}
    if "captions" in self.fields:
      record["captions"] = list(example.captions)
    return record

  def _metadata(self, i: int, key: str) -> dict[str, Any]:
    example = self._examples[i]
    return {**example.extra, "file_name": example.name, "key": key}
