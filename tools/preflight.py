"""Compiles a config's train step for a machine that need not be there.

  python tools/preflight.py --config=configs/mtv_b16_224.py \
    --topology=v5e:16x16

Without data, weights or a TPU: the compiler for TPUs comes with
pip install 'mtv_jax[preflight]'. Prints the batch, the parameters and their
sharding, memory and FLOPs of a chip, what the chips exchange, and what the
hosts must deliver. Ends with 1 where the step does not fit; --propose then
tries changes that would. Overrides are written --config.KEY=VALUE.

  python tools/preflight.py --table=docs/pods.md

compiles the configs of the table in that page, and writes it.

  python tools/preflight.py --scaling=step --config=configs/mtv_b16_224.py

compiles one step for 16, 64 and 256 chips of v5e at 64 rows a chip, and says by
how much memory and exchanges grow; --scaling=loss does so for the sigmoid loss
alone. Both write --json as well.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtv_jax.cli import errors


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", help="a file, arguments after a colon")
  parser.add_argument(
    "--set", action="append", default=[], help="KEY=VALUE, --config.KEY=VALUE"
  )
  parser.add_argument("--topology", help="v5e:16x16, v4:4x4x8, gpu:8xH100, ...")
  parser.add_argument("--json", type=Path, help="also write the result here")
  parser.add_argument("--tables", action="store_true", help="all parameters")
  parser.add_argument("--propose", action="store_true", help="try what fits")
  parser.add_argument(
    "--norms", action="store_true", help="also the objectives' gradient norms"
  )
  parser.add_argument("--mfu", type=float, default=0.4, help="assumed")
  parser.add_argument("--examples", type=int, help="of an epoch")
  parser.add_argument("--table", type=Path, help="a page to write a table in")
  parser.add_argument("--rows", nargs="*", help="only rows with these words")
  parser.add_argument(
    "--scaling", choices=("loss", "step"), help="the same on 16 to 256 chips"
  )
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  from mtv_jax.config import overrides

  with errors.readable_errors("preflight"):
    given = overrides.from_flags(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(given)
    from mtv_jax.cli import preflight

    if args.table:
      print(preflight.table(args.table, rows=args.rows or ()))
      return
    if args.scaling == "loss":
      print(preflight.scaling_of_losses(args.json))
      return
    if not args.config or not (args.topology or args.scaling):
      parser.error("--config and --topology are needed")
    if args.scaling:
      print(preflight.scaling_of_step(args.config, args.set, args.json))
      return
    fits = preflight.run(
      args.config,
      args.topology,
      changes=args.set,
      json=args.json,
      tables="all" if args.tables else "short",
      propose=args.propose,
      mfu=args.mfu,
      examples=args.examples,
      norms=args.norms,
    )
  raise SystemExit(0 if fits else 1)


if __name__ == "__main__":
  main()
