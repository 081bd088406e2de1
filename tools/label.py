"""Labels the images of shards with an expert model, on one host or many.

  python tools/label.py --expert=depth --weights=Depth-Anything-V2-Small-hf \
      --data='shards/*.tar' --out=labels/depth
  python tools/label.py --expert=boxes --weights=owlv2-base-patch16-ensemble \
      --data='shards/*.tar' --out=labels/boxes --phrases=ngrams

On a pod every host runs the same command, with --distributed; hosts that are
started by hand on one folder need nothing else. They divide the shards among
themselves, and a command that was stopped goes on when it is given again. Then

  python tools/label.py ... --verify=100

labels 100 records of the finished set again and fails if a label differs.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from mtv_jax.cli import errors
from mtv_jax.data.labels import bases as label_bases
from mtv_jax.data.labels.label_values import KINDS
from mtv_jax.experts.build import build_expert, parse_options
from mtv_jax.experts.labelling import run as labelling
from mtv_jax.experts.labelling.verify import verify
from mtv_jax.parallel import distributed
from mtv_jax.parallel.mesh import HostRows
from mtv_jax.train.metrics import setup_logging
from mtv_jax.utils.progress import Progress

# Options that are passed on to the expert where they are given.
_OPTIONS = {
  "phrases": (str, "ngrams, tags, tags:FIELD, or a file of one a line"),
  "threshold": (float, "boxes that score less are left out"),
  "nms": (float, "of two boxes that overlap more, the better one stays"),
  "max_boxes": (int, "of an image"),
  "names": (str, "file of an .onnx detector's classes, one a line"),
  "preprocess": (str, "of the images, for depth: original, ..."),
  "size": (int, "of the images that the expert sees"),
  "side": (int, "pixels a side of a stored map"),
  "dtype": (str, "of the computation: float32 or bfloat16"),
  "batch_size": (int, "images a step of each device"),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; 0 where it did what it was asked to."""
  args = _parser().parse_args(argv)
  with errors.readable_errors("label"):
    distributed.initialize(
      distributed=args.distributed,
      coordinator=args.coordinator,
      processes=args.processes,
      process=args.process,
    )
    setup_logging(process_index=jax.process_index())
    base = label_bases.open_base(
      args.data, index_dir=args.index_dir, captions="optional"
    )
    given = {name: getattr(args, name) for name in _OPTIONS}
    options = {name: v for name, v in given.items() if v is not None}
    expert = build_expert(
      args.expert, args.weights, options=options | parse_options(args.set)
    )
    if args.verify is not None:
      report = verify(
        expert, base, args.out, count=args.verify, threads=args.threads
      )
      print(report)
      return 1 if report.different else 0
    host = HostRows(jax.process_index(), jax.process_count())
    summary = labelling.run(
      expert,
      base,
      args.out,
      host=host,
      threads=args.threads,
      # Of several hosts the first one speaks for all.
      **({} if host.index else {"progress": Progress()}),
    )
    if not host.index:
      print(summary.told(args.expert, args.out))
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--expert", required=True, choices=KINDS, help="what it labels")
  add(
    "--weights",
    required=True,
    help="folder of Depth Anything V2 or OWLv2, .onnx file, run or export",
  )
  add(
    "--data",
    nargs="+",
    required=True,
    help="the shards: .tar or .array_record, ranges and globs",
  )
  add("--out", required=True, help="folder of the labels")
  add("--index_dir", help="of the tars' indices (default: beside them)")
  add("--threads", type=int, help="that decode; a core each by default")
  for name, (kind, text) in _OPTIONS.items():
    add(f"--{name}", type=kind, help=text)
  add(
    "--set",
    action="append",
    default=[],
    metavar="OPTION=VALUE",
    help="any other option of the expert, as --set=min_side=0.02",
  )
  add(
    "--verify",
    type=int,
    metavar="N",
    help="label N records of a finished set again and compare",
  )
  add(
    "--distributed",
    action="store_true",
    help="join the other hosts of a pod; each runs this same command",
  )
  add("--coordinator", help="host:port of process 0; implies --distributed")
  add("--processes", type=int, help="how many there are")
  add("--process", type=int, help="which one this is, from 0")
  return parser


if __name__ == "__main__":
  sys.exit(main())
