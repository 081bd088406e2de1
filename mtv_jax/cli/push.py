"""Uploads an export to the Hugging Face hub, with a complete model card.

  mtv-jax convert to_hf runs/a export
  mtv-jax evaluate --encoder=export --evals=knn --json=results.json
  mtv-jax push export ORG/NAME --license=apache-2.0 --data="COCO 2017, train" \\
      --results=results.json

The card has the licence, the data, the base model, the metrics with their
protocols, and code that loads the model; --dry_run writes it alone. Then
`mtv_jax.load("ORG/NAME")` opens the model.
"""

import argparse
import logging
import pathlib

from mtv_jax.config import foreign
from mtv_jax.convert import card, hf_files, native
from mtv_jax.encoder import hub
from mtv_jax.evals.core import results as results_lib
from mtv_jax.evals.report import tables
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax push`."""
  add = parser.add_argument
  add("folder", help="an export of `mtv-jax convert to_hf`")
  add("repo", help="the model's name on the hub, ORG/NAME")
  text = "the hub's identifier of the licence, such as apache-2.0"
  add("--license", required=True, help=text)
  text = "of --license=other: the licence's identifier"
  add("--license_name", help=text)
  text = "of --license=other: URL of its text, or its file in the folder"
  add("--license_link", help=text)
  text = "what the model was trained on, for the card"
  add("--data", required=True, help=text)
  text = "what it was continued from, such as ORG/NAME"
  add("--base_model", help=text)
  text = "JSON of `mtv-jax evaluate`, for the card"
  add("--results", help=text)
  add("--private", action="store_true", help="create a private model")
  add("--revision", help="branch to commit to (default: main)")
  text = "write the card into the folder, and upload nothing"
  add("--dry_run", action="store_true", help=text)


def run(args: argparse.Namespace) -> None:
  """Writes the card, uploads the folder and prints where it is."""
  folder = pathlib.Path(args.folder)
  if not card.is_repo(args.repo):
    raise InputError(f"{args.repo!r} is no name of a model: expected ORG/NAME.")
  readme = folder / "README.md"
  info = native.read_info(hf_files.require_folder(folder))
  if info is None or not readme.is_file():
    raise InputError(
      f"{folder} is no export: write one with `mtv-jax convert to_hf`."
    )
  native.restore_model(folder, info, None)  # Names a missing tokenizer.
  with hf_files.open_weights(folder):  # Names missing weights.
    pass
  text = card.complete_card(
    foreign.read_text(readme),
    repo=args.repo,
    licence=args.license,
    licence_name=args.license_name,
    licence_link=args.license_link,
    data=args.data,
    base_model=args.base_model,
    results=format_results(args.results) if args.results else "",
  )
  if args.license == "other" and not (args.license_name and args.license_link):
    log.warning(
      "The hub asks for --license_name and --license_link of 'other'."
    )
  if not args.results:
    log.warning("The card has no metrics: give them as --results=FILE.")
  atomic.write_text(readme, text)
  if args.dry_run:
    print(f"Wrote {readme}.")
    return
  url = hub.upload(
    folder, args.repo, private=args.private, revision=args.revision
  )
  print(f"Uploaded {folder} to {args.repo}: {url}")


def format_results(path: str) -> str:
  """The metrics and protocols of a file of results, as Markdown.

  Raises:
    InputError: it has results of several encoders.
  """
  outcomes = results_lib.read(path)
  if len(outcomes) != 1:
    raise InputError(
      f"{path} has results of {len(outcomes)} encoders; evaluate the export "
      "alone."
    )
  return f"```\n{tables.format_results(outcomes).strip()}\n```"
