"""Result cache: an encoder's results in a folder, reused if settings match.

FOLDER/EVALUATION.json       result or reason for skipping; settings
FOLDER/EVALUATION.npz        metrics per resample of the items
FOLDER/EVALUATION/*.png      sheets of images
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import mtv_jax
from mtv_jax.checkpoint import reading
from mtv_jax.config import foreign
from mtv_jax.config.options import plugin_digest
from mtv_jax.encoder import baselines, loading
from mtv_jax.evals.core import results
from mtv_jax.evals.core.results import Outcome
from mtv_jax.utils import path as path_lib
from mtv_jax.utils import path_patterns
from mtv_jax.utils.errors import InputError, MissingFileError

log = logging.getLogger(__name__)

FOLDER = "encoders"  # Folder of the stores of `mtv-jax evaluate`, by encoder.
# Options that name an encoder; its checkpoint is part of the settings.
_ENCODER_OPTIONS = ("reference", "model")


@dataclasses.dataclass(frozen=True)
class ResultStore:
  """The folder of an encoder's results.

  `settings` apply to all results; each evaluation adds its entry of
  `run.EvaluationPlan`.
  """

  folder: pathlib.Path
  settings: Mapping[str, Any]

  def find(self, name: str, entry: Mapping[str, Any]) -> Outcome | None:
    """Returns the stored outcome of an evaluation if its settings match.

    An unreadable file counts as missing and is overwritten.
    """
    try:
      return self._read(name, entry)
    except Exception as error:
      # Any error: on a pod, the remaining hosts wait for this answer.
      log.warning(
        "%s can't be read (%r): evaluating again", self._get_path(name), error
      )
      return None

  def _read(self, name: str, entry: Mapping[str, Any]) -> Outcome | None:
    file = self._get_path(name)
    content = foreign.read_object(file)
    if not content or content.get("settings") != self._make_settings(entry):
      return None
    (outcome,) = results.read(file)
    if name in outcome.skipped:
      return outcome
    if name not in outcome.results:
      return None
    names = foreign.read_field(content, "sheets", tuple[str, ...])
    outcome.results[name] = dataclasses.replace(
      outcome.results[name],
      sheets=results.read_sheets(file.with_suffix(""), names),
      resamples=results.read_resamples(file),
    )
    return outcome

  def write(
    self, name: str, entry: Mapping[str, Any], outcome: Outcome
  ) -> None:
    """Writes the outcome of a finished or skipped evaluation."""
    file = self._get_path(name)
    stem = file.with_suffix("")
    # Stale sheets and resamples would be read with this result.
    for stale in (file, file.with_suffix(".npz")):
      stale.unlink(missing_ok=True)
    shutil.rmtree(stem, ignore_errors=True)
    fields = {
      field: {k: v for k, v in getattr(outcome, field).items() if k == name}
      for field in ("results", "skipped")
    }
    extra: dict[str, Any] = {"settings": self._make_settings(entry)}
    if result := fields["results"].get(name):
      results.write_arrays(stem, result)
      extra["sheets"] = list(result.sheets)
    # The JSON is written last: it marks the result as complete.
    outcome = dataclasses.replace(outcome, **fields, failed={})
    results.write(file, [outcome], **extra)

  def _get_path(self, name: str) -> pathlib.Path:
    return self.folder / f"{name}.json"

  def _make_settings(self, entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON settings, to compare with those in a stored file."""
    settings = {**self.settings, "evaluation": entry}
    settings["mtv_jax"] = mtv_jax.__version__
    settings["data"] = _describe_files(entry)
    if digest := plugin_digest(entry):
      settings["plugins"] = digest
    return json.loads(json.dumps(results.jsonable(settings), default=str))


def describe_encoder(path: str, weights: str, dtype: str) -> dict[str, Any]:
  """Returns the settings that identify an encoder in a `ResultStore`."""
  settings = {"encoder": path, "weights": weights, "dtype": dtype}
  return {**settings, **describe_weights(path)}


def describe_weights(path: str | os.PathLike) -> dict[str, Any]:
  """Config hash, last step and files of a run, or fingerprint of a release."""
  if baselines.is_baseline(os.fspath(path)):
    return {}
  folder = loading.open_folder(path)
  if loading.is_run(path):
    config = path_lib.read_bytes(folder / "config.json")
    step = next(reversed(reading.saved_steps(folder)), None)
    return {
      "config": hashlib.sha256(config).hexdigest()[:16],
      "step": step,
      "files": fingerprint(folder / "checkpoints" / str(step)),
    }
  return {"files": fingerprint(folder)}


def _describe_files(options: Mapping[str, Any]) -> dict[str, Any]:
  """Fingerprints of the files that options name; any text may be a path."""
  fingerprints: dict[str, Any] = {}
  for option, value in options.items():
    if isinstance(value, Mapping):
      fingerprints[option] = _describe_files(value)
    elif option in _ENCODER_OPTIONS and value is not None:
      fingerprints[option] = describe_weights(value)
    elif isinstance(value, str | os.PathLike) and option != "type":
      fingerprints[option] = fingerprint(value)
  return fingerprints


def fingerprint(path: str | os.PathLike) -> str:
  """Hash of file names, sizes and modification times.

  Covers a file, the files in a folder (not its subfolders), or the tars that
  match a pattern; "" for any text that isn't a path.
  """
  text, path = os.fspath(path), path_lib.as_path(path)
  files = [path] if path_lib.is_file(path) else []
  if path_lib.is_folder(path):
    files = [path / name for name in path_lib.list_folder(path)]
  elif not files and ".tar" in text:
    with contextlib.suppress(InputError, MissingFileError):
      files = path_patterns.expand_path(text)
  digest = hashlib.sha256()
  for file in files:
    line = f"{file.name}/\n"
    if path_lib.is_file(file):
      stat = path_lib.stat(file)
      line = f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n"
    digest.update(line.encode("utf-8", "replace"))
  return digest.hexdigest()[:16] if files else ""
