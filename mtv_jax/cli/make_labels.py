"""Writes label sets from existing annotations.

  mtv-jax make_labels boxes --data='shards/*.tar' \\
      --output=labels/boxes \\
      --instances instances_train2017.json instances_val2017.json
  mtv-jax make_labels depth --data='shards/*.tar' \\
      --output=labels/depth --depth_dir=nyu_depths --pattern={stem}.png \\
      --metric --scale=25.5

Then train with
  data.train = [dict(type="webdataset", path="shards/*.tar",
                     labels=dict(boxes="labels/boxes", depth="labels/depth"))].

Records are matched by original file name, which `make_shards` and img2dataset
store. Rerunning the command resumes.
"""

import argparse
from collections.abc import Sequence
from typing import Literal

from mtv_jax.cli import arguments
from mtv_jax.config import options
from mtv_jax.data import registry
from mtv_jax.data.labels import annotations, label_values
from mtv_jax.data.labels.label_writer import LabelWriter
from mtv_jax.utils.progress import Progress


class BoxFlags(arguments.ShardFlags):
  """Flags of `mtv-jax make_labels boxes`.

  Args:
    instances: COCO's instances_*.json.
    match: match a record by its file's name, its .json's image_id, or its key.
    output: folder of the label set, local, gs:// or s3://.
  """

  instances: Sequence[str]
  match: Literal[annotations.MATCHES] = "name"
  output: str


class DepthFlags(arguments.ShardFlags):
  """Flags of `mtv-jax make_labels depth`, except --metric and --inverse.

  Args:
    depth_dir: folder of the depth images.
    pattern: file name with {key}, {stem}, {name} or {image_id}.
    scale: divisor of the values, such as 1000 for millimetres.
    side: side of a stored map, in pixels.
    bits: bits of a stored pixel.
    min_valid: minimum number of valid pixels in a label.
    invalid: values that mark a missing measurement.
    output: folder of the label set, local, gs:// or s3://.
  """

  depth_dir: str
  pattern: str = "{stem}.png"
  scale: float = 1.0
  side: int = label_values.SIDE
  bits: int = label_values.BITS
  min_valid: int = label_values.MIN_VALID
  invalid: Sequence[int] = (0,)
  output: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the subcommands `boxes` and `depth`."""
  kinds = parser.add_subparsers(dest="kind", required=True)
  boxes = kinds.add_parser("boxes", help="from COCO's instances_*.json")
  arguments.add_parameters(boxes, BoxFlags)
  depth = kinds.add_parser("depth", help="from depth images of 8 or 16 bits")
  arguments.add_parameters(depth, DepthFlags)
  values = depth.add_mutually_exclusive_group(required=True)
  option = dict(dest="values", action="store_const")
  text = "larger is farther; stored inverted"
  values.add_argument("--metric", const="metric", help=text, **option)
  text = "larger is nearer"
  values.add_argument("--inverse", const="inverse", help=text, **option)


def run(args: argparse.Namespace) -> None:
  """Writes the label set and prints a summary."""
  base = registry.open_files(
    args.data, index_dir=args.index_dir, captions="ignored"
  )
  if args.kind == "boxes":
    annotate = annotations.Instances(args.instances, match=args.match)
  else:
    names = ("pattern", "values", "scale", "invalid")
    names += ("side", "bits", "min_valid")
    label_options = {name: getattr(args, name) for name in names}
    label_options["folder"] = args.depth_dir
    annotate = options.build(
      annotations.DepthImages, label_options, where="depth"
    )
  writer = LabelWriter(
    args.output, kind=args.kind, base=base, settings=annotate.settings
  )
  progress = Progress(unit="records")
  summary = annotations.write(writer, annotate, progress=progress)
  print(summary.format_summary(args.kind, args.output))
