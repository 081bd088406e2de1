"""Models of the Hugging Face hub, through huggingface_hub and its cache.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_HOME` are that package's.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from typing import Any

from mtv_jax.utils.errors import InputError, MissingFileError, printable

PREFIX = "hf:"
_NAME = re.compile(
  r"(?P<repo>\w[\w.-]*/\w[\w.-]*?)(?:@(?P<revision>[\w./-]+))?"
)
# Files that the readers of `convert` open; weights of PyTorch are left out.
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


def is_name(path: str | os.PathLike) -> bool:
  """Whether a path is a model of the hub.

  That is, `hf:ORG/NAME`, or `ORG/NAME` where there is no folder ORG; each with
  an optional `@REVISION`.
  """
  text = os.fspath(path)
  if text.startswith(PREFIX):
    return True
  match = _NAME.fullmatch(text)
  return bool(match) and not os.path.exists(match["repo"].partition("/")[0])


@functools.lru_cache
def download(name: str) -> pathlib.Path:
  """The folder of a model in the cache, downloaded if it is not there.

  Within a process a name is one revision. Without a network the revision that
  was downloaded last is taken.

  Raises:
    InputError: for a name of another form.
    MissingFileError: the hub has no such model, or can't be reached, or its
      package is not installed.
  """
  match = _NAME.fullmatch(name.removeprefix(PREFIX))
  if match is None:
    raise InputError(
      f"{printable(name)!r} is no model of the hub; expected hf:ORG/NAME or "
      "hf:ORG/NAME@REVISION."
    )
  try:
    hub = import_hub()
  except ImportError as error:
    raise MissingFileError(f"{name} is no local path, and {error}") from error
  try:
    folder = hub.snapshot_download(
      match["repo"],
      revision=match["revision"],
      allow_patterns=list(_FILES),
      endpoint=endpoint(),
    )
  except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
    reason = printable(" ".join(str(error).split()))
    raise MissingFileError(
      f"{name} is no local path, and can't be read from the hub: {reason}"
    ) from error
  return pathlib.Path(folder)


def upload(
  folder: pathlib.Path,
  repo: str,
  *,
  private: bool = False,
  revision: str | None = None,
  message: str = "Upload with mtv_jax",
) -> str:
  """Uploads the files of a folder to a model of the hub, which it creates.

  Returns the URL of the commit.

  Raises:
    InputError: the hub refuses it, or can't be reached.
  """
  hub = import_hub()
  api = hub.HfApi(endpoint=endpoint())
  try:
    api.create_repo(repo, private=private, exist_ok=True)
    commit = api.upload_folder(
      repo_id=repo,
      folder_path=folder,
      revision=revision,
      commit_message=message,
    )
  except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
    reason = printable(" ".join(str(error).split()))
    raise InputError(
      f"{folder} can't be uploaded to {repo}: {reason}. Log in with `hf auth "
      "login`, or set HF_TOKEN to a token that may write."
    ) from error
  return str(commit.commit_url)


def endpoint() -> str | None:
  """`HF_ENDPOINT`, which the package itself reads only when it is imported."""
  return os.environ.get("HF_ENDPOINT") or None


def import_hub() -> Any:
  """Imports huggingface_hub, an optional dependency; ImportError without it."""
  try:
    import huggingface_hub
    import huggingface_hub.errors
  except ImportError as error:
    raise ImportError(
      "huggingface_hub is not installed: pip install 'mtv_jax[hub]', or "
      "download the folder and give its path."
    ) from error
  return huggingface_hub
