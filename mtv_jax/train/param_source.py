"""The source of the parameters that a run loads: initial ones and teachers'."""

import importlib
import os
from typing import Any, Protocol, cast, runtime_checkable

from mtv_jax.config.origin import Origin

# Imported when a config names a path.
_SOURCE = "mtv_jax.encoder.loading"


@runtime_checkable
class ParamSource(Protocol):
  """Reads runs, exports and released encoders by path; see `encoder.loading`.

  Raises MissingFileError or InputError for what it can't read.
  """

  LANGUAGE_MODEL: str  # Name of the head with a language model's decoder.

  def check_source(self, path: str, *, weights: str | None, step: int | None):
    """Raises the errors of `read_params` without reading parameters."""

  def read_model_info(self, path: str) -> Any:
    """The architecture (`spec`), `preprocess` and `tokenizer` of a path."""

  def read_params(self, path: str, **options: Any) -> dict[str, Any]:
    """Parameters as NumPy arrays: `{image, text, heads}`."""

  def read_teacher(self, path: str, **options: Any) -> dict[str, Any]:
    """Parameters of a run's EMA teacher."""

  def read_language_model(self, path: str) -> Any:
    """A language model with its `params`."""

  def read_origin(self, path: str | os.PathLike) -> Origin:
    """What the parameters were trained from and on."""

  def pin_name(self, path: str) -> str:
    """The path with its commit, for logs."""


def open_param_source() -> ParamSource:
  """Imports the source; training from random parameters never calls this."""
  return cast(ParamSource, importlib.import_module(_SOURCE))
