"""Evaluates several encoders and compares them side by side on one page.

    mtv-jax compare runs/a runs/b --evals=knn,retrieval --output=compared
    mtv-jax compare siglip=siglip-base dino=hf:facebook/dinov2-base runs/a \\
      --evals=zero_shot,knn --data=imagenet --output=compared
    mtv-jax compare old=results/old/results.json runs/new --output=compared

An encoder is `[NAME=]PATH[@WEIGHTS][@CHECKPOINT]`; paths are as in `evaluate
--encoder`. `@CHECKPOINT` is a Hugging Face id: it declares a folder to be that
released checkpoint, so that the page shows its published figures; hub paths
without a revision do so too. A `.json` file holds results of `evaluate` or
`compare`; encoders given this way are not evaluated.

Writes a self-contained report.html, report.md with its images, results.json,
and each evaluation's results under encoders/. Rerunning the command resumes, as
in `evaluate`. Results from different protocols or data get separate rows.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

import jax

from mtv_jax.cli import arguments, evaluate
from mtv_jax.evals import encoder_requests, suite
from mtv_jax.evals.core import results
from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.encoder_requests import Request
from mtv_jax.report import evaluations, tables


class Flags(
  evaluate.Evaluations, arguments.WeightFlags, arguments.DistributedFlags
):
  """Flags of `mtv-jax compare`.

  Args:
    baseline: NAME of the encoder to compare with; default: the first.
    output: folder for the report and the results.
  """

  baseline: str | None = None
  output: str


EPILOG = evaluate.EPILOG


def run(encoders: Sequence[str], /, args: Flags) -> None:
  """Evaluates and writes the report; raises SystemExit listing failures.

  Args:
    encoders: [NAME=]PATH[@WEIGHTS][@CHECKPOINT], or .json of earlier results.
  """
  arguments.initialize_distributed(args)
  plan = evaluate.read_plan(args)
  arguments.check_writable(args.output)
  columns = _read_columns(encoders, weights=args.weights)
  names = [column.name for column in columns]
  encoder_requests.check_names(names)
  baseline = args.baseline or names[0]
  evaluations.check_baseline(baseline, names)
  requests = [column for column in columns if isinstance(column, Request)]
  log_fn = functools.partial(print, file=sys.stderr, flush=True)
  new_outcomes = suite.evaluate(
    evaluate.stored_encoders(requests, args.output, args.dtype),
    plan,
    checkpoints={request.name: request.checkpoint for request in requests},
    features=evaluate.open_features(args),
    log_fn=log_fn,
  )
  by_name = {outcome.name: outcome for outcome in new_outcomes}
  outcomes = [by_name.get(column.name, column) for column in columns]
  if jax.process_index() == 0:
    if any(outcome.results for outcome in outcomes):
      index = names.index(baseline)
      print(tables.format_metrics(outcomes, split=True, baseline=index))
    size = None if args.reference == "none" else args.reference
    files = evaluations.write_evaluation(
      args.output, outcomes, baseline=baseline, size=size
    )
    print("\nWritten:", *files, sep="\n  ")
  if failed := suite.errors(new_outcomes, plan):
    raise SystemExit("compare: " + "\n".join(failed))


def _read_columns(
  encoders: Sequence[str], *, weights: str | None
) -> list[Request | Outcome]:
  """Reads encoders to evaluate and earlier outcomes, in command-line order."""
  paths = [text for text in encoders if not text.endswith(".json")]
  requests = iter(encoder_requests.parse_requests(paths, weights=weights))
  columns = []
  for text in encoders:
    if text in paths:
      columns.append(next(requests))
      continue
    name, path = encoder_requests.split_name(text)
    outcomes = results.read(path)
    for outcome in outcomes:
      names = [name, outcome.name] if len(outcomes) > 1 else [name]
      column = " ".join(names) if name else outcome.name
      columns.append(dataclasses.replace(outcome, name=column))
  return columns
