"""Hugging Face hub models, through huggingface_hub and its cache."""

from __future__ import annotations

import functools
import os
import pathlib
import re
from typing import Any

from mtv_jax.convert import card, open_clip
from mtv_jax.utils.errors import InputError, MissingFileError, printable
from mtv_jax.utils.hub import endpoint, import_hub, open_api

PREFIX = "hf:"
_REVISION = re.compile(r"[\w./-]+")
# Files that `convert` reads, without copies in other precisions. PyTorch files
# are read only if a model has no safetensors.
MODEL_FILES = ("*.json", "*.model", "*.txt", "README.md", "model-*.safetensors")
_WEIGHTS = ("model", "params", "heads", "open_clip_model")
MODEL_FILES += tuple(f"{name}.safetensors" for name in _WEIGHTS)
_TORCH_FILES = ("*pytorch_model*.bin", "*.pth")


def is_name(path: str | os.PathLike) -> bool:
  """Whether a path names a hub model.

  Hub names are `hf:ORG/NAME`, or `ORG/NAME` unless a folder ORG exists, each
  with an optional `@REVISION`.
  """
  text = os.fspath(path)
  if text.startswith(PREFIX):
    return True
  parts = _split_name(text)
  return bool(parts) and not os.path.exists(parts[0].partition("/")[0])


def _split_name(name: str) -> tuple[str, str | None] | None:
  """Splits `ORG/NAME@REVISION`; None for other names."""
  repo, at, revision = name.partition("@")
  if not card.is_repo(repo) or (at and not _REVISION.fullmatch(revision)):
    return None
  return repo, revision or None


def pin_name(path: str | os.PathLike) -> str:
  """Pins a hub name to `ORG/NAME@COMMIT`; returns other paths unchanged."""
  text = os.fspath(path)
  if not is_name(text):
    return text
  # Snapshot folders are named by commit.
  return f"{text.partition('@')[0]}@{download(text).name}"


@functools.lru_cache
def download(name: str, files: tuple[str, ...] = MODEL_FILES) -> pathlib.Path:
  """Downloads a hub model's files if they are not cached; returns its folder.

  A name resolves once per process. Offline, it resolves to the revision that
  was downloaded last.
  """
  parts = _split_name(name.removeprefix(PREFIX))
  if parts is None:
    raise InputError(
      f"{printable(name)!r} is not a hub model; expected hf:ORG/NAME or "
      "hf:ORG/NAME@REVISION."
    )
  try:
    hub = import_hub()
  except ImportError as error:
    raise MissingFileError(f"{name} is not a local path; {error}") from error
  options = {"allow_patterns": list(files), "endpoint": endpoint()}
  try:
    folder = hub.snapshot_download(parts[0], revision=parts[1], **options)
  except _error_types(hub) as error:
    raise MissingFileError(
      f"{name} is not a local path, and can't be read from the hub: "
      f"{_format_error(error)}"
    ) from error
  folder = pathlib.Path(folder)
  # An open_clip model's other safetensors may hold only its image tower.
  is_open_clip = open_clip.is_folder(folder)
  pattern = open_clip.WEIGHTS if is_open_clip else "*.safetensors"
  if files == MODEL_FILES and not any(folder.glob(pattern)):
    return download(name, (*files, *_TORCH_FILES))
  return folder


def upload(
  folder: pathlib.Path,
  repo: str,
  *,
  private: bool = False,
  revision: str | None = None,
) -> str:
  """Uploads to a hub model, created if missing; returns the commit's URL."""
  hub, api = import_hub(), open_api()
  options = dict(revision=revision, commit_message="Upload with mtv_jax")
  try:
    api.create_repo(repo, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=repo, folder_path=folder, **options)
  except _error_types(hub) as error:
    reason = _format_error(error).rstrip(".")
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = (
      " Log in with `hf auth login`, or set HF_TOKEN to a token that can write."
      if status in (401, 403)
      else ""
    )
    raise InputError(
      f"{folder} can't be uploaded to {repo}: {reason}.{hint}"
    ) from error
  return str(commit.commit_url)


def _format_error(error: Exception) -> str:
  return printable(" ".join(str(error).split()))


def _error_types(hub: Any) -> tuple[type[Exception], ...]:
  """Exceptions of huggingface_hub, including connection failures.

  The bases of `HfHubHTTPError` depend on the HTTP library.
  """
  return (*hub.errors.HfHubHTTPError.__bases__, OSError, ValueError)
