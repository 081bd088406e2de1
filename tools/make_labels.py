"""Makes label sets for shards from annotations that there are.

  python tools/make_labels.py boxes --base='shards/*.tar' \
      --output=labels/boxes \
      --instances instances_train2017.json instances_val2017.json
  python tools/make_labels.py depth --base='shards/*.tar' \
      --output=labels/depth --depth_dir=nyu_depths --pattern={stem}.png \
      --metric --scale=25.5

Then train with
  data.train = [dict(type="webdataset", path="shards/*.tar",
                     labels=dict(boxes="labels/boxes", depth="labels/depth"))].

Records are found by the name of the file that they were made from, which
tools/make_shards.py and img2dataset keep. A command that was stopped goes on
where it was when it is given again.
"""

import argparse
import sys
from collections.abc import Sequence

from mtv_jax.data.labels import annotations, label_values
from mtv_jax.data.labels import bases as label_bases
from mtv_jax.data.labels.label_writer import LabelWriter
from mtv_jax.utils.progress import Progress


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; 0 where it did what it was asked to."""
  args = _parser().parse_args(argv)
  try:
    base = label_bases.open_base(args.base, index_dir=args.index_dir)
    if args.kind == "boxes":
      make = annotations.Instances(args.instances, match=args.match)
    else:
      make = annotations.DepthImages(
        args.depth_dir,
        pattern=args.pattern,
        values=args.values,
        scale=args.scale,
        invalid=args.invalid,
        side=args.side,
        min_valid=args.min_valid,
      )
    writer = LabelWriter(
      args.output, kind=args.kind, base=base, settings=make.settings
    )
    summary = annotations.write(writer, make, progress=Progress(unit="records"))
  except (OSError, ValueError) as error:
    print(f"make_labels: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
      print(note, file=sys.stderr)
    return 1
  print(summary.told(args.kind, args.output))
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  kinds = parser.add_subparsers(dest="kind", required=True)
  boxes = kinds.add_parser("boxes", help="from COCO's instances_*.json")
  boxes.add_argument("--instances", nargs="+", required=True)
  boxes.add_argument(
    "--match",
    default="name",
    choices=annotations.MATCHES,
    help="what a record is found by: the name of its file, the image_id of its"
    " .json, or its key",
  )
  depth = kinds.add_parser("depth", help="from depth images of 8 or 16 bits")
  depth.add_argument("--depth_dir", required=True)
  depth.add_argument(
    "--pattern",
    default="{stem}.png",
    help="a file's name, with {key}, {stem}, {name} or {image_id}",
  )
  kind = depth.add_mutually_exclusive_group(required=True)
  for values, text in (
    ("metric", "larger is farther: inverted"),
    ("inverse", "larger is nearer"),
  ):
    kind.add_argument(
      f"--{values}",
      dest="values",
      action="store_const",
      const=values,
      help=text,
    )
  depth.add_argument(
    "--scale",
    type=float,
    default=1.0,
    help="what values are divided by, such as 1000 for millimetres",
  )
  depth.add_argument(
    "--invalid",
    type=int,
    nargs="+",
    default=[0],
    help="values that mean that there is no measurement",
  )
  depth.add_argument(
    "--side", type=int, default=128, help="pixels a side of a stored label"
  )
  depth.add_argument(
    "--min_valid",
    type=int,
    default=label_values.MIN_VALID,
    help="a label of fewer pixels is left out",
  )
  for parser_of_kind in (boxes, depth):
    parser_of_kind.add_argument(
      "--base",
      nargs="+",
      required=True,
      help="the shards: .tar or .array_record, ranges and globs",
    )
    parser_of_kind.add_argument("--output", required=True)
    parser_of_kind.add_argument(
      "--index_dir", help="of the tars' indices (default: beside them)"
    )
  return parser


if __name__ == "__main__":
  sys.exit(main())
