"""Where a model's weights come from: its base, teachers and label experts.

A run writes its `Origin` to `origin.json`, an export to `mtv_jax.json`, and a
label set to `origin.json`. Model cards are derived from it.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from mtv_jax.config import foreign, sections
from mtv_jax.config.sections import sparse
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, did_you_mean

FILE = "origin.json"
# https://huggingface.co/docs/hub/repositories-licenses
_HUB_LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m
bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd
bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql
ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3
llama4 grok2-community gemma unknown other
"""
LICENCES = frozenset(_HUB_LICENCES.split())
# Licences that permit another one for derived weights.
_PERMISSIVE = re.compile(
  r"apache-2\.0|mit|bsd.*|isc|cc0-1\.0|cc-by-\d\.\d|cdla-permissive-.*|"
  r"unlicense|wtfpl|zlib|ncsa|postgresql|pddl|openmdw-.*|afl-3\.0|bsl-1\.0"
)
# `license: mit`, or the first of a list on this line or the next.
_README_LICENCE = re.compile(
  r"^['\"]?license['\"]?[ \t]*:[ \t]*(?:#.*)?(?:\n[ \t]*-[ \t]*|\[[ \t]*)?"
  r"['\"]?([\w.+-]+)",
  re.MULTILINE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """Origin of the weights of a run, a folder or a file."""

  # ORG/NAME on the hub, or the last part of a path.
  name: str | None = sparse(None)
  revision: str | None = sparse(None)  # Commit, for hub models.
  licence: str | None = sparse(None)  # `license` of the folder's README.
  # How this package trained them; None: it only read or converted them.
  training: Literal["full", "lora"] | None = sparse(None)
  # What the training started from; None: random weights.
  init: "Origin | None" = sparse(None)
  teachers: Mapping[str, "Origin"] = dataclasses.field(default_factory=dict)
  labels: Mapping[str, "Origin"] = dataclasses.field(default_factory=dict)
  data: tuple[str, ...] = ()  # Names of the training data.

  @property
  def chain(self) -> Iterator["Origin"]:
    """This model, and the models that it continues, nearest first."""
    node: Origin | None = self
    while node is not None:
      yield node
      node = node.init

  @property
  def base(self) -> "Origin | None":
    """The model that is continued or converted; None: random weights.

    The nearest one on the hub, or else the first that was not trained here.
    """
    ancestors = [n for n in self.chain if n is not self or not self.training]
    published = [n for n in ancestors if n.revision or not n.training]
    return next(iter(published), None)

  @property
  def sources(self) -> Iterator[tuple[str, "Origin"]]:
    """Teachers and label experts of the chain, as ("teacher", origin).

    A teacher that the run continues, an anchor, is left out.
    """
    for node in self.chain:
      for teacher in node.teachers.values():
        if teacher not in self.chain:
          yield "teacher", teacher
      for kind, origin in node.labels.items():
        yield f"expert for {kind}", origin

  def describe_base(self, name: str | None = None) -> str:
    """Markdown of the base model, teachers and label experts, for a card.

    `name` is the base's, if it was read from a local folder.
    """
    base, methods = self.base, [n.training for n in self.chain if n.training]
    text = "None: trained from random weights."
    if base is not None:
      text = dataclasses.replace(base, name=name or base.name).describe()
      history = "converted without training"
      if methods:
        history = "continued with LoRA" if "lora" in methods else "continued"
      text += f", {history}."
    lines = [f"- {role}: {node.describe()}" for role, node in self.sources]
    lines = [*dict.fromkeys(lines)]
    return "\n".join(
      [text, "", "Learnt from:", "", *lines] if lines else [text]
    )

  def describe(self) -> str:
    """Name, revision and licence, for a card."""
    revision = f", revision {self.revision}" if self.revision else ""
    licence = self.licence or "not recorded"
    return f"{self.name or 'unnamed'}{revision} (licence: {licence})"


def read(content: Any) -> Origin:
  """Reads an origin from JSON, the inverse of `sections.to_dict`."""
  try:
    return sections.read(Origin, content, "origin")
  except RecursionError:
    raise InputError("origin is nested too deeply.") from None


def read_file(path: pathlib.PurePath) -> Origin | None:
  """Reads the `origin` of a JSON file; None if absent."""
  content = foreign.read_object(path).get("origin")
  with foreign.errors_of(path):
    return read(content) if content else None


def to_json(origin: Origin) -> str:
  """The content of `origin.json`."""
  return json.dumps({"origin": sections.to_dict(origin)}, indent=2) + "\n"


def name_folder(path: pathlib.PurePath, origin: Origin | None = None) -> Origin:
  """The origin of a folder or file, with its name, revision and licence.

  A snapshot in the hub's cache is named after its repository.
  """
  fields: dict[str, Any] = {"name": path.name, "licence": read_licence(path)}
  repo = re.fullmatch(r"models--(.+?)--(.+)", "".join(path.parts[-3:-2]))
  if repo and path.parts[-2] == "snapshots":
    fields |= dict(name="/".join(repo.groups()), revision=path.name)
  return dataclasses.replace(origin or Origin(), **fields)


def read_licence(folder: pathlib.PurePath) -> str | None:
  """The licence in a folder's README; the first if several."""
  readme = folder / "README.md"
  if not path_lib.is_file(readme):
    return None
  data = path_lib.read_regular(readme, limit=path_lib.MAX_JSON)
  text = "\n".join(data.decode("utf-8", errors="replace").splitlines())
  front_matter = re.match(r"\ufeff?\s*---[ \t]*\n(.*?)\n---", text, re.DOTALL)
  match = front_matter and _README_LICENCE.search(front_matter[1])
  return match[1].lower() if match else None


def check_licence(licence: str, origin: Origin | None = None) -> None:
  """Raises InputError for a licence that the hub or a base does not allow.

  A model keeps the licence of the models it continues, unless that is
  permissive; `other` stands for a licence that the hub does not list.
  """
  if licence not in LICENCES:
    raise InputError(
      f"The licence {licence!r} is not an identifier of the hub. "
      f"{did_you_mean(licence, LICENCES)} Use 'other' for any other licence."
    )
  for node in origin.chain if origin else ():
    parent_licence = node.licence or "unknown"
    required_licence = parent_licence if parent_licence in LICENCES else "other"
    is_permissive = _PERMISSIVE.fullmatch(parent_licence)
    if required_licence not in ("unknown", licence) and not is_permissive:
      raise InputError(
        f"{node.name}, which this model comes from, has the licence "
        f"{parent_licence}, which {licence} does not keep: pass "
        f"--license={required_licence}."
      )
