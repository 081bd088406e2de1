"""Uploads an export with its model card to the Hugging Face hub.

  mtv-jax convert to_hf runs/a export
  mtv-jax evaluate --encoder=export --evals=knn --json=results.json
  mtv-jax push export ORG/NAME --license=apache-2.0 --data="COCO 2017, train" \\
      --results=results.json

The card lists licence, data, base model, metrics with their protocols, and code
that loads the model; --dry_run writes only the card. Load the uploaded model
with `mtv_jax.load("ORG/NAME")`.
"""

import logging
import pathlib

from mtv_jax.cli import arguments
from mtv_jax.config import foreign
from mtv_jax.convert import card, hf_files, native
from mtv_jax.encoder import hub
from mtv_jax.evals.core import results as results_lib
from mtv_jax.report import tables
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError

log = logging.getLogger(__name__)


class Flags(arguments.Flags):
  """Flags of `mtv-jax push`.

  Args:
    license: licence identifier on the hub, such as apache-2.0.
    license_name: licence identifier, for --license=other.
    license_link: URL or file in the folder, for --license=other.
    data: training data, for the card.
    base_model: model that training started from, such as ORG/NAME.
    results: JSON of `mtv-jax evaluate`, for the card.
    private: create a private model.
    revision: branch to commit to (default: main).
    dry_run: write the card into the folder; upload nothing.
  """

  license: str
  license_name: str | None = None
  license_link: str | None = None
  data: str
  base_model: str | None = None
  results: str | None = None
  private: bool = False
  revision: str | None = None
  dry_run: bool = False


def run(folder: str, repo: str, /, args: Flags) -> None:
  """Writes the card, uploads the folder and prints the URL.

  Args:
    folder: an export of `mtv-jax convert to_hf`.
    repo: the model's name on the hub, ORG/NAME.
  """
  folder = pathlib.Path(folder)
  if not card.is_repo(repo):
    raise InputError(f"{repo!r} is no name of a model: expected ORG/NAME.")
  readme = folder / "README.md"
  info = native.read_info(hf_files.require_folder(folder))
  if info is None or not readme.is_file():
    raise InputError(
      f"{folder} is not an export: write one with `mtv-jax convert to_hf`."
    )
  native.restore_model(folder, info, None)  # Raises without a tokenizer.
  with hf_files.open_weights(folder):  # Raises without weights.
    pass
  text = card.complete_card(
    foreign.read_text(readme),
    repo=repo,
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
  url = hub.upload(folder, repo, private=args.private, revision=args.revision)
  print(f"Uploaded {folder} to {repo}: {url}")


def format_results(path: str) -> str:
  """Formats the metrics and protocols of one encoder's results as Markdown."""
  outcomes = results_lib.read(path)
  if (count := len(outcomes)) != 1:
    raise InputError(
      f"{path} has results of {count} encoders; evaluate the export alone."
    )
  return f"```\n{tables.format_results(outcomes).strip()}\n```"
