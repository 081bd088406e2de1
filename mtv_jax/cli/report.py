"""Puts runs or a study on one page: metrics, curves, images, what differs.

mtv-jax report runs/a --output=runs/a
mtv-jax report runs/a runs/b --output=reports/a_b
mtv-jax report studies/ladder --output=docs/study/ladder

The folder receives `report.html`, which needs no other file, and the same as
`report.md` with its images.
"""

import argparse
import pathlib
import tempfile

from mtv_jax.studies import runner
from mtv_jax.studies.report import report
from mtv_jax.train import workdir


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax report`."""
  text = "a run's folder, or the folder of one study"
  parser.add_argument("runs", nargs="+", metavar="RUN", help=text)
  parser.add_argument("--output", required=True, help="folder of the report")


def run(args: argparse.Namespace) -> None:
  """Writes the report."""
  with tempfile.TemporaryDirectory() as temporary:
    runs = [
      workdir.copy_run(run, pathlib.Path(temporary) / f"{i}")
      for i, run in enumerate(args.runs)
    ]
    if len(runs) == 1 and (runs[0] / runner.STUDY).exists():
      paths = report.write_study(runs[0], args.output)
    else:
      paths = report.write_runs(runs, args.output)
  for path in paths:
    print(f"wrote {path}")
