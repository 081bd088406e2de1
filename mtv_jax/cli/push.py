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
from typing import Any

from mtv_jax.cli import arguments
from mtv_jax.config import foreign
from mtv_jax.config.origin import Origin
from mtv_jax.convert import card, hf_files, native, open_clip
from mtv_jax.evals.core import results as results_lib
from mtv_jax.report import tables
from mtv_jax.utils import atomic, hub
from mtv_jax.utils.errors import InputError

log = logging.getLogger(__name__)


class Flags(arguments.Flags):
  """Flags of `mtv-jax push`.

  Args:
    license: licence identifier on the hub, such as apache-2.0.
    license_name: licence identifier, for --license=other.
    license_link: URL or file in the folder, for --license=other.
    data: training data, for the card; default: the names of the run's data.
    base_model: ORG/NAME of the model that training started from; default: the
      recorded one. Required if that is a local folder.
    results: JSON of `mtv-jax evaluate`, for the card.
    private: create a private model.
    revision: branch to commit to (default: main).
    dry_run: write the card into the folder; upload nothing.
  """

  license: str
  license_name: str | None = None
  license_link: str | None = None
  data: str | None = None
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
  if not hub.is_repo(repo):
    raise InputError(f"{repo!r} is not a model name: expected ORG/NAME.")
  readme = folder / "README.md"
  info = native.read_info(hf_files.require_folder(folder))
  if info is None or not readme.is_file():
    raise InputError(
      f"{folder} is not an export: write one with `mtv-jax convert to_hf`."
    )
  native.restore_model(folder, info, None)  # Raises without a tokenizer.
  names = (hf_files.WEIGHTS, open_clip.WEIGHTS)
  with hf_files.open_weights(folder, *names):  # Raises without weights.
    pass
  origin_fields = describe_origin(info.origin, args)
  text = card.complete_card(
    foreign.read_text(readme),
    repo=repo,
    licence=args.license,
    licence_name=args.license_name,
    licence_link=args.license_link,
    **origin_fields,
    results=format_results(args.results) if args.results else "",
  )
  if args.license == "other" and not (args.license_name and args.license_link):
    log.warning(
      "--license=other: the hub asks for --license_name and --license_link."
    )
  if not args.results:
    log.warning("The card has no metrics: pass them as --results=FILE.")
  atomic.write_text(readme, text)
  if args.dry_run:
    print(f"Wrote {readme}.")
    return
  url = card.upload(folder, repo, private=args.private, revision=args.revision)
  print(f"Uploaded {folder} to {repo}: {url}")


def describe_origin(recorded: Origin | None, args: Flags) -> dict[str, Any]:
  """Returns the card's data, base model and origin from an export's record.

  Raises InputError if the flags contradict the record or leave a gap in it.
  """
  card.check_licence(args.license, recorded)
  data, base_model = args.data, args.base_model
  chain = recorded.chain if recorded else ()
  names = dict.fromkeys(name for node in chain for name in node.data)
  if not (data or names):
    raise InputError("The export has no record of its data: pass --data.")
  if recorded is None:
    log.warning("The export has no record of its origin.")
    return {"data": data, "base_model": base_model}
  base = recorded.base
  recorded_base = base.name if base and base.revision else None
  if base and not (recorded_base or base_model):
    raise InputError(
      f"The export comes from the folder {base.name}: name that model with "
      "--base_model=ORG/NAME."
    )
  if (recorded_base or not base) and base_model not in (None, recorded_base):
    raise InputError(
      f"--base_model={base_model}, but the export comes from "
      f"{recorded_base or 'random weights'}: leave it out."
    )
  if base and base.licence is None:
    log.warning(f"The licence of {base.name} is not recorded: check it.")
  for role, node in recorded.sources:
    if "-nc" in (node.licence or "") and "-nc" not in args.license:
      log.warning(
        f"The {role} {card.describe_origin(node)} is not for commercial use."
      )
  names_text = f"Recorded names: {', '.join(names)}." if names else ""
  return {
    "data": "\n\n".join(filter(None, (data, names_text))),
    "base_model": base_model or recorded_base,
    "origin": card.describe_base(recorded, base_model),
  }


def format_results(path: str) -> str:
  """Formats the metrics and protocols of one encoder's results as Markdown."""
  outcomes = results_lib.read(path)
  if (count := len(outcomes)) != 1:
    raise InputError(
      f"{path} has results for {count} encoders; evaluate the export alone."
    )
  return f"```\n{tables.format_results(outcomes).strip()}\n```"
