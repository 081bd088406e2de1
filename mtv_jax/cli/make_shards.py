"""Writes shards of images with captions.

  mtv-jax make_shards captions_train2017.json captions_val2017.json \\
      --images train2017 val2017 --output shards
  mtv-jax make_shards pairs.csv --image_column=file --output=shards
  mtv-jax make_shards folder_of_jpg_and_txt --output=shards

Then train with data.train = [dict(type="webdataset", path="shards/*.tar")].
"""

import argparse
from collections import Counter

from mtv_jax.data.sources import listings, shard_writer
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax make_shards`."""
  add = parser.add_argument
  add(
    "inputs",
    nargs="+",
    help="COCO caption .json, .csv, .tsv, .parquet, or folders of images with"
    " a .txt or .json beside each",
  )
  add("--output", required=True, help="folder of the shards")
  add(
    "--images",
    nargs="+",
    help="folder the image names are relative to, one for all inputs or one"
    " for each (default: that of the input)",
  )
  add("--image_column", default="image")
  add("--caption_column", default="caption")
  add("--format", default="webdataset", choices=["webdataset", "array_record"])
  add("--records_per_shard", type=int, default=10_000)
  add(
    "--max_side",
    type=int,
    help="shrink larger images to this longer side (JPEG, quality 95); by"
    " default files are copied unchanged",
  )


def run(args: argparse.Namespace) -> None:
  """Writes the shards and prints a summary."""
  folders = args.images or [None]
  if len(folders) == 1:
    folders = folders * len(args.inputs)
  if len(folders) != len(args.inputs):
    raise InputError(
      f"--images names {len(folders)} folders for {len(args.inputs)} inputs; "
      "give one, or one for each."
    )
  examples = []
  for path, images in zip(args.inputs, folders, strict=True):
    examples += listings.read(
      path,
      images=images,
      image_column=args.image_column,
      caption_column=args.caption_column,
    )
  progress = Progress()
  report = shard_writer.write(
    examples,
    args.output,
    format=args.format,
    records_per_shard=args.records_per_shard,
    max_side=args.max_side,
    progress=lambda report: progress(report.done, report.total),
  )
  _print_summary(report, args.output)


def _print_summary(report: shard_writer.ShardReport, out: str) -> None:
  print(
    f"\n{report.written:,} records in {len(report.shards)} shards in {out};"
    f" {len(report.skipped):,} skipped."
  )
  reasons = Counter(skipped.problem for skipped in report.skipped)
  for reason, count in reasons.most_common(10):
    print(f"  {count:,} times: {reason}")
  for skipped in report.skipped[:10]:
    print(f"  {skipped.name}: {skipped.problem}")
  if report.skipped:
    print(f"{out}/skipped.jsonl lists all skipped inputs.")
