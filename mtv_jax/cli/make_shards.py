"""Writes shards of image-caption pairs.

  mtv-jax make_shards captions_train2017.json captions_val2017.json \\
      --images train2017 val2017 --output shards
  mtv-jax make_shards pairs.csv --image_column=file --output=shards
  mtv-jax make_shards folder_of_jpg_and_txt --output=shards
  mtv-jax make_shards hf://datasets/ORG/NAME --output=shards

Then train with data.train = [dict(type="webdataset", path="shards/*.tar")].
"""

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from mtv_jax.data.registry import build_source, find_source
from mtv_jax.data.sources import listings, shard_writer
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.progress import Progress


def run(
  inputs: Sequence[str],
  /,
  *,
  output: str,
  images: Sequence[str] = (),
  image_column: str = "image",
  caption_column: str = "caption",
  format: Literal["webdataset", "array_record"] = "webdataset",
  records_per_shard: int = 10_000,
  max_side: int | None = None,
) -> None:
  """Writes the shards and prints a summary.

  Args:
    inputs: COCO caption .json, .csv, .tsv, .parquet, folders of images with a
      .txt or .json beside each, shards, or hub data sets.
    output: folder for the shards.
    images: folder of the images, one for all inputs or one each; default: the
      input's folder.
    image_column: table column of image names.
    caption_column: table column of captions.
    format: shard format.
    records_per_shard: maximum number of records in a shard.
    max_side: shrink larger images to this longer side (JPEG, quality 95); by
      default files are copied unchanged.
  """
  folders = list(images) or [None]
  if len(folders) == 1:
    folders = folders * len(inputs)
  if len(folders) != len(inputs):
    raise InputError(
      f"--images names {len(folders)} folders for {len(inputs)} inputs; "
      "pass one, or one for each."
    )
  _check_output(output, inputs)
  columns = dict(image_column=image_column, caption_column=caption_column)
  parts = [
    _open_examples(path, folder, columns)
    for path, folder in zip(inputs, folders, strict=True)
  ]
  examples = parts[0] if len(parts) == 1 else [*itertools.chain(*parts)]
  progress = Progress()
  report = shard_writer.write(
    examples,
    output,
    format=format,
    records_per_shard=records_per_shard,
    max_side=max_side,
    progress=lambda report: progress(report.done, report.total),
  )
  print(
    f"\n{report.written:,} records in {len(report.shards)} shards in {output};"
    f" {len(report.skipped):,} skipped."
  )
  reasons = Counter(skipped.problem for skipped in report.skipped)
  for reason, count in reasons.most_common(10):
    print(f"  {count:,} times: {reason}")
  for skipped in report.skipped[:10]:
    print(f"  {skipped.name}: {skipped.problem}")
  if report.skipped:
    print(f"{output}/skipped.jsonl lists all skipped inputs.")


def _check_output(output: str, inputs: Sequence[str]) -> None:
  """Raises InputError if the output folder is inside an input folder."""
  target = Path(output).expanduser().resolve()
  for path in (Path(path).expanduser() for path in inputs):
    if path.is_dir() and target.is_relative_to(path.resolve()):
      raise InputError(
        f"The output {output} is in the input {path}: name a folder elsewhere."
      )


def _open_examples(
  path: str, images: str | None, columns: Mapping[str, str]
) -> Sequence[listings.Example]:
  """Opens a listing or shards; prints which splits are used."""
  path = os.path.expanduser(path)
  entry = find_source(path)
  if entry["type"] == "folder":
    if entry["path"] != path:
      print(f"{path}: using all splits; for one split, pass {entry['path']}.")
    return listings.read(path, images=images, **columns)
  source = build_source({"path": path, "images": images})
  print(f"{path}: reading {source!r}.")
  return shard_writer.SourceExamples(source)
