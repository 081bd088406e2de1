"""Class names and prompt templates: built in, or from a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from mtv_jax.config import foreign
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError, MissingFileError

DEFAULT_TEMPLATES = (
  "{}",
  "a picture of a {}",
  "an image that shows a {}",
  "one {} in the scene",
  "there is a {} here",
  "a view of the {}",
)

# By name; `tcl`: TCL's (Cha et al. 2023), for TIPS's zero-shot segmentation.
TEMPLATE_SETS = {
  "tcl": (
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of many {}.",
    "a photo of {}s.",
  )
}

# CLIP_benchmark's files in the folder of a data set.
CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"

# Suffixes of its JSON files for one language: lists by data set.
_NAMES_END = "_classnames.json"
_TEMPLATES_END = "_zeroshot_classification_templates.json"
_IMAGENET = "imagenet1k"


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Class names and templates of a text classifier."""

  classes: tuple[str, ...]  # in the order of the labels
  templates: tuple[str, ...] = DEFAULT_TEMPLATES  # each with one `{}`
  # Class ids of the data set (such as WordNet ids), if any.
  ids: tuple[str, ...] | None = None
  name: str = "built in"  # for protocols

  def __post_init__(self):
    classes, templates = len(self.classes), len(self.templates)
    for text in self.templates:
      if text.count("{}") != 1:
        raise InputError(
          f"{self.name}: template {text!r} must contain '{{}}' exactly once"
        )
    if not classes or not templates:
      raise InputError(
        f"{self.name}: {classes} classes and {templates} templates; expected "
        "at least one of each"
      )
    ids = range(classes) if self.ids is None else self.ids
    if not len(set(ids)) == len(ids) == classes:
      raise InputError(
        f"{self.name}: {len(ids)} ids, {len(set(ids))} of them distinct, for "
        f"{classes} classes; expected one id per class"
      )

  @property
  def digest(self) -> str:
    """Hash of classes and templates, in their order."""
    text = json.dumps([self.classes, self.templates])
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def protocol(self) -> dict[str, Any]:
    """Protocol entries."""
    return {
      "prompts": self.name,
      "prompts_hash": self.digest,
      "templates": list(self.templates),
    }


def read_prompts(
  path: str | os.PathLike,
  *,
  classes: int | None = None,
  prompt_set: str = _IMAGENET,
) -> Prompts:
  """Reads class names and templates; `classes` is the expected number of names.

  The path is JSON, `{"classes": [...], "templates": [...], "ids": [...]}`, as
  `mtv-jax make_prompts` writes for ImageNet; a text file with one name per
  line; a folder with CLIP_benchmark's two text files; or its class names in a
  language, such as `jp_classnames.json` beside the templates, where
  `prompt_set` selects a data set. `templates` and `ids` are optional.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    prompts = Prompts(_read_lines(path / CLASS_NAMES), name=CLASS_NAMES)
    if (path / TEMPLATES).is_file():
      prompts = replace_templates(prompts, path / TEMPLATES)
  elif not path.is_file():
    raise MissingFileError(
      f"no prompt file {path}; mtv-jax make_prompts writes ImageNet's"
    )
  elif path.suffix == ".txt":
    prompts = Prompts(_read_lines(path), name=path.name)
  elif path.name.endswith(_NAMES_END):
    prompts = _read_language(path, prompt_set)
  else:
    prompts = _read_json(path)
  if classes not in (None, len(prompts.classes)):
    raise InputError(
      f"{path} names {len(prompts.classes)} classes, but the data has "
      f"{classes}; expected one name per class, in that order"
    )
  return prompts


def _read_language(path: pathlib.Path, prompt_set: str) -> Prompts:
  """Reads names and templates; a data set without templates gets ImageNet's."""
  templates = path.with_name(path.name.replace(_NAMES_END, _TEMPLATES_END))
  values = []
  for file in (path, templates):
    content = foreign.read_object(file)
    is_default = file == templates and prompt_set not in content
    key = _IMAGENET if is_default else prompt_set
    with foreign.errors_of(file):
      values.append(foreign.read_field(content, key, tuple[str, ...]))
  classes, lines = values
  prompts = Prompts(classes, name=f"{path.name}, {prompt_set}")
  return dataclasses.replace(prompts, templates=_parse_templates(lines))


def replace_templates(prompts: Prompts, path: str | os.PathLike) -> Prompts:
  """Replaces the templates with a set of `TEMPLATE_SETS` or a text file's.

  One template per line, with `{}` or CLIP_benchmark's `{c}` for the name.
  """
  lines = TEMPLATE_SETS.get(path) or _read_lines(pathlib.Path(path))
  return dataclasses.replace(
    prompts,
    templates=_parse_templates(lines),
    name=f"{prompts.name}, {pathlib.Path(path).name}",
  )


def _parse_templates(lines: Sequence[str]) -> tuple[str, ...]:
  return tuple(line.replace("{c}", "{}") for line in lines)


def _read_lines(path: pathlib.Path) -> tuple[str, ...]:
  if not path.is_file():
    raise MissingFileError(
      f"no file {path}; expected one name or prompt per line"
    )
  lines = foreign.read_text(path).splitlines()
  return tuple(line.strip() for line in lines if line.strip())


def _read_json(path: pathlib.Path) -> Prompts:
  """Reads prompts from a JSON file."""
  content = foreign.read_untrusted_json(path)
  if not isinstance(content, dict) or "classes" not in content:
    got = sorted(content)[:8] if isinstance(content, dict) else type(content)
    raise InputError(
      f"{path}: expected an object with 'classes', and optionally 'templates' "
      f"and 'ids'; got {got}"
    )
  fields = {}
  for key in ("classes", "templates", "ids"):
    values = [] if content.get(key) is None else content[key]
    is_list = isinstance(values, list)
    if not is_list or not all(isinstance(v, str) and v for v in values):
      raise InputError(f"{path}: {key!r} must be a list of non-empty strings")
    if values or key == "ids" and content.get(key) is not None:
      fields[key] = tuple(values)
  return Prompts(**{"classes": (), **fields}, name=path.name)


def write_prompts(path: str | os.PathLike, prompts: Prompts) -> None:
  """Writes a JSON file for `read_prompts`."""
  content = {"classes": prompts.classes, "templates": prompts.templates}
  if prompts.ids is not None:
    content["ids"] = prompts.ids
  text = json.dumps(content, indent=1, ensure_ascii=False)
  atomic.write_text(path, text + "\n")


def imagenet_prompts() -> Prompts:
  """ImageNet's 1000 names and 80 templates from an installed open_clip.

  The WordNet ids come from timm, a dependency of open_clip, whose own list has
  the same order but lacks ids.
  """
  try:
    import open_clip
    from timm.data import ImageNetInfo
  except ImportError as error:
    raise ImportError(
      "ImageNet's prompts are read from open_clip, which is not installed: "
      "pip install open_clip_torch (only this command needs it)"
    ) from error
  info = ImageNetInfo("imagenet-1k")
  count = info.num_classes()
  return Prompts(
    classes=tuple(open_clip.IMAGENET_CLASSNAMES),
    templates=tuple(t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES),
    ids=tuple(info.index_to_label_name(i) for i in range(count)),
    name="open_clip ImageNet",
  )
