"""Uploads an export to the Hugging Face hub, with a complete model card.

  mtv-jax convert to_hf runs/a export
  mtv-jax evaluate --encoder=export --evals=knn --json=results.json
  mtv-jax push export ORG/NAME --license=apache-2.0 --data="COCO 2017, train" \\
      --results=results.json

The card has the licence, the data, the base model, the metrics with their
protocols, and code that loads the model; --dry_run writes it alone. Then
`mtv_jax.load("ORG/NAME")` opens the model.
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
    license: the hub's identifier of the licence, such as apache-2.0.
    license_name: of --license=other: the licence's identifier.
    license_link: of --license=other: URL of its text, or its file in the
      folder.
    data: what the model was trained on, for the card.
    base_model: what it was continued from, such as ORG/NAME.
    results: JSON of `mtv-jax evaluate`, for the card.
    private: create a private model.
    revision: branch to commit to (default: main).
    dry_run: write the card into the folder, and upload nothing.
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


def run(
  folder: str,
  repo: str,
  /,
  args: Flags,
) -> None:
  """Writes the card, uploads the folder and prints where it is.

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
      f"{folder} is no export: write one with `mtv-jax convert to_hf`."
    )
  native.restore_model(folder, info, None)  # Names a missing tokenizer.
  with hf_files.open_weights(folder):  # Names missing weights.
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
