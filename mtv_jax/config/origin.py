"""Where a model's weights come from: its base, teachers and label experts.

A run writes its `Origin` to `origin.json`, an export to `mtv_jax.json`, and a
label set to `origin.json`. Model cards are derived from it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from mtv_jax.config import foreign, sections
from mtv_jax.config.sections import sparse
from mtv_jax.utils.errors import InputError

FILE = "origin.json"


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
