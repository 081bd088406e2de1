"""Labels the images of shards with an expert model, on one host or many.

  mtv-jax label --expert=depth --weights=Depth-Anything-V2-Small-hf \\
      --data='shards/*.tar' --output=labels/depth
  mtv-jax label --expert=boxes --weights=owlv2-base-patch16-ensemble \\
      --data='shards/*.tar' --output=labels/boxes --phrases=ngrams

  mtv-jax label --expert=features --weights=dinov2-large \\
      --data='shards/*.tar' --output=labels/dino --dtype=bfloat16

On a pod every host runs the same command with --distributed; hosts started by
hand on one shared folder need no option. They divide the shards among
themselves, and the same command resumes an interrupted one. Afterwards,

  mtv-jax label ... --verify=100

labels 100 records of the finished set again and fails if a label differs.
"""

import argparse

import jax

from mtv_jax.cli import arguments
from mtv_jax.data import registry
from mtv_jax.data.labels.label_values import KINDS
from mtv_jax.experts.build import build_expert, parse_options
from mtv_jax.experts.labelling import run as labelling
from mtv_jax.experts.labelling.verify import verify
from mtv_jax.parallel.mesh import HostRows
from mtv_jax.train.metrics import setup_logging
from mtv_jax.utils.progress import Progress

# Options of the experts, passed on where given.
_OPTIONS = {
  "phrases": (str, "ngrams, tags, tags:FIELD, or a file of one per line"),
  "threshold": (float, "minimum score of a box"),
  "nms": (float, "IoU above which the lower-scoring box of two is dropped"),
  "max_boxes": (int, "of an image"),
  "names": (str, "file of an .onnx detector's classes, one per line"),
  "preprocess": (str, "of the images, for depth: original, ..."),
  "size": (int, "of the expert's input images"),
  "side": (int, "side of a stored map, in pixels"),
  "canvas": (int, "of data.ops in training, for features"),
  "format": (str, "of features: float8 or int8"),
  "dtype": (str, "of the computation: float32 or bfloat16"),
  "batch_size": (int, "images per step and device"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax label`."""
  add = parser.add_argument
  add("--expert", required=True, choices=KINDS, help="kind of the labels")
  text = (
    "folder of Depth Anything V2 or OWLv2, .onnx file, run or export; of "
    "features, any encoder"
  )
  add("--weights", required=True, help=text)
  arguments.add_shards(parser)
  add("--output", required=True, help="folder of the label set")
  add("--threads", type=int, help="decoding threads; one per core by default")
  arguments.add_options(parser, _OPTIONS)
  text = "any other option of the expert, as --set=min_side=0.02"
  arguments.add_set(parser, "OPTION=VALUE", text)
  text = "label N records of a finished set again and compare"
  add("--verify", type=int, metavar="N", help=text)
  arguments.add_distributed(parser)


def run(args: argparse.Namespace) -> int:
  """Labels or verifies; 1 where a verified label differs."""
  arguments.initialize_distributed(args)
  setup_logging(process_index=jax.process_index())
  base = registry.open_files(
    args.data, index_dir=args.index_dir, captions="optional"
  )
  options = {name: getattr(args, name) for name in _OPTIONS}
  options = {
    name: value for name, value in options.items() if value is not None
  }
  options |= parse_options(args.set)
  expert = build_expert(args.expert, args.weights, options=options)
  if args.verify is not None:
    report = verify(
      expert, base, args.output, count=args.verify, threads=args.threads
    )
    print(report)
    return 1 if report.different else 0
  host = HostRows(jax.process_index(), jax.process_count())
  summary = labelling.run(
    expert,
    base,
    args.output,
    host=host,
    threads=args.threads,
    # Host 0 reports for all.
    **({} if host.index else {"progress": Progress()}),
  )
  if not host.index:
    print(summary.format_summary(args.expert, args.output))
  return 0
