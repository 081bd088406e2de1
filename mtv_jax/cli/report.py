"""Puts runs or a study on one page: metrics, curves, images, what differs.

mtv-jax report runs/a --output=runs/a
mtv-jax report runs/a runs/b --output=reports/a_b
mtv-jax report studies/ladder --output=docs/study/ladder

The folder receives `report.html`, which needs no other file, and the same as
`report.md` with its images.
"""

import argparse
import pathlib

from mtv_jax.studies import runner
from mtv_jax.studies.report import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax report`."""
  text = "a run's folder, or the folder of one study"
  parser.add_argument("runs", nargs="+", metavar="RUN", help=text)
  parser.add_argument("--output", required=True, help="folder of the report")


def run(args: argparse.Namespace) -> None:
  """Writes the report."""
  first = pathlib.Path(args.runs[0])
  if len(args.runs) == 1 and (first / runner.STUDY).exists():
    paths = report.write_study(first, args.output)
  else:
    paths = report.write_runs(args.runs, args.output)
  for path in paths:
    print(f"wrote {path}")
