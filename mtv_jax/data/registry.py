"""Source registry: opens the sources that configs and command lines name."""

import functools
import glob
import inspect
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple

from mtv_jax.config.options import PositiveInt, Range, build, build_entry
from mtv_jax.config.registry import LazyRegistry
from mtv_jax.data.canvas import IMAGE_SUFFIXES
from mtv_jax.data.records import LABEL_FIELDS, NoRecordsError
from mtv_jax.data.sources.base import LimitedSource, Paths, Source
from mtv_jax.utils import hub
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  UserError,
  did_you_mean,
)
from mtv_jax.utils.path_patterns import expand_path, pin, split_paths
from mtv_jax.utils.text import list_first

log = logging.getLogger(__name__)

# Source classes, by `type` in a config.
_SOURCES = "mtv_jax.data.sources"
SOURCES: Mapping[str, type[Source]] = LazyRegistry(
  {
    "array_record": f"{_SOURCES}.array_record:ArrayRecordSource",
    "conversations": "mtv_jax.data.conversations:ConversationSource",
    "folder": f"{_SOURCES}.listings:FolderSource",
    "parquet": f"{_SOURCES}.parquet:ParquetSource",
    "scenes": "mtv_jax.data.scenes.source:SceneSource",
    "tfds": f"{_SOURCES}.tfds:TFDSSource",
    "webdataset": f"{_SOURCES}.webdataset:WebDatasetSource",
  }
)

# Options of control runs, see `labels.join.ControlSource`.
_CONTROL_OPTIONS = (
  "shuffled_labels",
  "whole_image_boxes",
  "phrases_as_captions",
)
# Overrides that remove an entry's labels, limit and controls.
WHOLE = dict.fromkeys(("labels", "limit", *_CONTROL_OPTIONS))
# Listings of image files, see `sources.listings`.
_LISTING_SUFFIXES = (".json", ".csv", ".tsv")
# Suffixes of shards by type, in order of preference: img2dataset writes a table
# beside each tar.
SHARD_SUFFIXES = {
  "array_record": ".array_record",
  "webdataset": ".tar",
  "parquet": ".parquet",
}
_SHARD_SUFFIXES = tuple(SHARD_SUFFIXES.values())
# Prefix of the names of TFDS data sets.
_TFDS_PREFIX = "tfds:"
# Split names, found in shard names (as on Hugging Face) or as folder names.
_SPLITS = ("train|training", "val|valid|validation|dev", "test")
_EXPECTED_PATHS = (
  "Expected a folder of images, shards (*.tar, *.parquet, *.array_record) or a"
  " folder of them, a listing (.json, .csv, .tsv), hf://datasets/ORG/NAME,"
  " tfds:NAME or scenes."
)


def build_source(config: Mapping[str, Any]) -> Source:
  """Builds the source of an entry of `data.train`, with its label sets.

  The entry has `type` (a key of `SOURCES`, or `MODULE:NAME` for a user's class)
  and the arguments of that class. `find_source` infers a missing `type` from
  `path`. `labels` (see `labels.join`) adds label sets; `limit` takes that many
  records, evenly spaced; `shuffled_labels` (label kinds),
  `whole_image_boxes` and `phrases_as_captions` make a `ControlSource`;
  `weight`, for mixing, is ignored.
  """
  if config.get("type") is None and config.get("path") is not None:
    source_config = find_source(config["path"])
    parameters = inspect.signature(SOURCES[source_config["type"]]).parameters
    if config.get("images") is not None and "images" not in parameters:
      raise InputError(
        f"images={config['images']}: the shards {config['path']} contain their"
        " images. Leave out `images`."
      )
    unused = {"path", "captions", "images"} - {*parameters}
    config = {
      k: v for k, v in config.items() if k not in unused
    } | source_config
  reserved = "weight", *WHOLE
  source = build_entry(
    SOURCES, config, where="data.train", reserved=reserved, base=Source
  )
  return complete_source(source, config)


def read_weight(config: Mapping[str, Any]) -> float:
  """Returns the mixing weight of an entry of `data.train`."""

  # Ratios beyond these bounds overflow in the order of the mixture.
  def build_weight(weight: Annotated[float, Range(1e-9, 1e12)] = 1.0) -> float:
    return weight

  options = {k: v for k, v in config.items() if k == "weight"}
  return build(build_weight, options, where="data.train")


def complete_source(
  source: Source,
  config: Mapping[str, Any],
  *,
  fields: Collection[str] | None = None,
) -> Source:
  """Adds labels (of `fields`; None: all), limit and controls to a source."""
  labels, source_fields = config.get("labels"), source.fields
  if labels is not None:
    if fields is not None and config.get("phrases_as_captions"):
      fields = {*fields, "phrases"}  # No op reads them.
    # Label sets and their storage are loaded by the runs that have them.
    from mtv_jax.data.labels.join import join_labels

    source = join_labels(source, labels, fields=fields)

  def wrap(
    limit: PositiveInt | None = None,
    shuffled_labels: tuple[Literal[(*LABEL_FIELDS,)], ...] = (),
    whole_image_boxes: bool = False,
    phrases_as_captions: bool = False,
  ) -> Source:
    wrapped = source if limit is None else LimitedSource(source, limit)
    reads_boxes = whole_image_boxes or phrases_as_captions
    if not (shuffled_labels or reads_boxes):
      return wrapped
    requests = [name for name in _CONTROL_OPTIONS if controls.get(name)]
    required_kinds = {*shuffled_labels, *["boxes"][:reads_boxes]}
    for kind in required_kinds - {*(labels or ())}:
      if not source_fields & {*LABEL_FIELDS[kind]}:
        raise InputError(
          f"{source!r} has no {kind} for {' and '.join(requests)}: add"
          f" labels=dict({kind}=...) to it in data.train."
        )
    from mtv_jax.data.labels.join import ControlSource

    shuffled_fields = {f for k in shuffled_labels for f in LABEL_FIELDS[k]}
    return ControlSource(
      wrapped, shuffled_fields, whole_image_boxes, phrases_as_captions
    )

  controls = {n: config.get(n) for n in ("limit", *_CONTROL_OPTIONS)}
  controls = {n: value for n, value in controls.items() if value is not None}
  return build(wrap, controls, where="data.train")


def open_files(paths: Paths, **options: Any) -> Source:
  """Opens files, a folder or a hub data set, see `find_source`.

  Options that are None or unknown to the type are ignored.
  """
  entry = find_source(paths)
  parameters = inspect.signature(SOURCES[entry["type"]]).parameters
  set_options = {k: v for k, v in options.items() if v is not None}
  options = {k: v for k, v in set_options.items() if k in parameters}
  return build_source(entry | options)


def find_source(
  path: Paths, *, split: Literal["train", "test"] = "train"
) -> dict[str, Any]:
  """Infers a source's type from its path; returns its config entry.

  `tfds:NAME[:SPLIT]` is a data set prepared by TFDS, in its default folder.
  The suffix implies the type of shards (default: tar); .json, .csv, .tsv and a
  .parquet without images are listings of image files. "scenes" are the built-in
  scenes. A folder with images is read as image files; any other folder, and a
  hub data set (`hf://datasets/ORG/NAME`), as its shards. If shards' names
  contain split names, or all subfolders with images are named after splits,
  `train` is the training split, else the files not held out, else all, and
  `test` is the validation split, else the test split, else as `train`.

  Raises NoRecordsError for a remote folder without shards, InputError for an
  unreadable folder, and for `test` if all shards are of a training split.
  """
  if isinstance(config := parse_tfds(path), dict):
    return config
  paths = split_paths(path)
  if paths == ["scenes"]:
    return {"type": "scenes"}
  if len(paths) == 1 and _is_folder(folder := paths[0]):
    is_remote = path_lib.is_remote(folder)
    folder = pin(folder) if is_remote else os.path.expanduser(folder)
    shards = [] if is_remote else _list_shards(folder)
    for kind, suffix in SHARD_SUFFIXES.items():
      files = [path for path in shards if path.endswith(suffix)]
      if is_remote:
        files = _list_remote(folder, suffix)
      if files:
        return {"type": kind, "path": _choose_split(files, folder, split)}
    if is_remote:
      raise NoRecordsError(
        f"There are no shards in {folder} (*.tar, *.parquet or"
        " *.array_record); image files of a bucket are not read one by one."
      )
    return {"type": "folder", "path": _choose_folder(folder, split)}
  if len(paths) == 1 and _is_listing(paths[0]):
    return {"type": "folder", "path": paths[0]}
  for name in paths:
    _check_shards(name)
  return {"type": source_type(paths), "path": paths}


def parse_tfds(path: Any) -> Any:
  """Parses `tfds:NAME[:VERSION][:SPLIT]` into a config; keeps other paths."""
  if not (isinstance(path, str) and path.startswith(_TFDS_PREFIX)):
    return path
  match = re.fullmatch(r"([^:]+(?::\d+\.\d+\.[\d*]+)?)(?::(.+))?", path[5:])
  if match is None:
    raise InputError(
      f"{path}: expected {_TFDS_PREFIX}NAME[:SPLIT], such as"
      f" {_TFDS_PREFIX}cifar100 or {_TFDS_PREFIX}eurosat/rgb:2.0.0:train[:80%]"
    )
  name, split = match.groups()
  return {"type": "tfds", "name": name} | ({"split": split} if split else {})


def list_shared(
  train: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]
) -> list[str]:
  """Lists files and folders that both `data.train` and held-out entries read.

  Compares paths, not images; ignores paths that can't be read.
  """
  entries = {str(entry.get("path")): entry for entry in held_out}.values()
  held = {path for entry in entries for path in _list_inputs(entry, "test")}
  shared = set()
  for entry in train if held else ():
    trained = {*_list_inputs(entry, "train")}
    shared |= {p for p in held if trained & {p, *map(str, PurePath(p).parents)}}
  return sorted(shared)


def _list_inputs(entry: Mapping[str, Any], split: str) -> list[str]:
  try:
    if (paths := entry.get("path")) and entry.get("type") is None:
      entry = find_source(paths, split=split)
    paths, kind = entry.get("path", []), entry.get("type")
    paths = [paths] if kind == "folder" else expand_path(paths)
  # The source or evaluation raises the error, or reads the path itself.
  except (UserError, OSError):
    return []
  paths = [os.path.expanduser(path) for path in paths]
  return [p if path_lib.is_remote(p) else os.path.realpath(p) for p in paths]


def _is_listing(path: str) -> bool:
  """Whether a path is a listing: JSON, a table, or Parquet without images."""
  path = os.path.expanduser(path)
  if path.endswith(SHARD_SUFFIXES["parquet"]) and os.path.isfile(path):
    from mtv_jax.data.sources.parquet import has_images

    return not has_images(path)
  return path.lower().endswith(_LISTING_SUFFIXES)


def _check_shards(name: str) -> None:
  if name.endswith(_SHARD_SUFFIXES):
    return
  if _is_pattern(name):
    if name.lower().endswith(IMAGE_SUFFIXES):
      raise InputError(f"{name} is a pattern of images: pass their folder.")
    return
  path = path_lib.as_path(os.path.expanduser(name))
  if path_lib.exists(path):
    raise InputError(f"{name} is a file of another kind. {_EXPECTED_PATHS}")
  hint = did_you_mean(path.name, path_lib.list_folder(path.parent), limit=8)
  raise MissingFileError(f"{name} is missing. {hint} {_EXPECTED_PATHS}")


def _is_pattern(path: str) -> bool:
  return glob.has_magic(path) or "{" in path


def _is_folder(path: str) -> bool:
  if not path_lib.is_remote(path):
    return os.path.isdir(os.path.expanduser(path))
  return not (_is_pattern(path) or path.endswith(_SHARD_SUFFIXES))


def _list_remote(folder: str, suffix: str) -> list[str]:
  """Shards in a bucket's folder, or anywhere in a hub data set."""
  if hub.is_hub(folder):
    try:
      pattern = f"{folder.rstrip('/')}/**/*{suffix}"
      return [*map(os.fspath, expand_path(pattern, suffix=suffix))]
    except MissingFileError:
      return []
  names = path_lib.list_folder(folder)
  return [f"{folder.rstrip('/')}/{n}" for n in names if n.endswith(suffix)]


class _Folder(NamedTuple):
  folders: list[str]  # Without hidden folders and lost+found.
  shards: list[str]
  has_images: bool


def _list_shards(folder: str) -> list[str]:
  """Lists shards in a folder, or its subfolders if it lacks shards and images.

  Empty if a scanned folder has images: files beside images are not shards.
  """
  parts = [_scan_folder(folder)]
  if not (parts[0].shards or parts[0].has_images):
    parts = map(_scan_folder, parts[0].folders)
  shards = []
  for part in parts:
    if part.has_images:
      return []
    shards += part.shards
  return sorted(shards)


def _scan_folder(folder: str) -> _Folder:
  folders, shards, has_images = [], [], False
  try:
    with os.scandir(folder) as entries:
      for entry in entries:
        if entry.name.endswith(_SHARD_SUFFIXES):
          shards.append(entry.path)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
          has_images = True
        elif entry.is_dir() and not re.match(r"\.|lost\+found$", entry.name):
          folders.append(entry.path)
  except OSError as error:
    raise InputError(f"{folder} can't be read: {error.strerror}.") from error
  return _Folder(sorted(folders), shards, has_images)


def _choose_split(files: Sequence[str], folder: str, split: str) -> list[str]:
  training, validation, test = (
    [f for f in files if re.search(pattern, f[len(folder) :].lower())]
    for pattern in (rf"(?:^|[-_./])(?:{s})(?:[-_./]|$)" for s in _SPLITS)
  )
  if split == "test" and (validation or test):
    return validation or test
  if split == "test" and len(training) == len(files):
    raise InputError(
      f"All shards in {folder} are in a training split"
      f" ({list_first(files, 3)}): pass held-out shards."
    )
  held_out = {*validation, *test}
  return training or [f for f in files if f not in held_out] or list(files)


def _choose_folder(folder: str, split: str) -> str:
  """Returns a split's subfolder, if all subfolders with images are splits.

  Else the folder, with a warning if some are splits: `train` may be a class.
  """
  top = _scan_folder(folder)
  training, validation, test = (
    [f for f in top.folders if re.fullmatch(s, os.path.basename(f).lower())]
    for s in _SPLITS
  )
  splits = [*training, *validation, *test]
  if not splits:
    return folder
  other_folders = {*top.folders} - {*splits}
  split_folders = training if split == "train" else validation or test
  reads_all = len(split_folders) != 1 or top.has_images
  from mtv_jax.data.sources import listings

  if not (reads_all or any(map(listings.find_image, other_folders))):
    return split_folders[0]
  _warn_of_splits(folder, list_first([*map(os.path.basename, splits)], 5))
  return folder


@functools.cache
def _warn_of_splits(folder: str, names: str) -> None:
  """Warns once, since a run resolves a source several times."""
  log.warning(
    f"{folder}: reading all its images, including {names}, named like"
    " splits. To read one split, pass its folder."
  )


def source_type(paths: Paths) -> str:
  """Returns the `type` of data files; InputError if they differ."""
  files = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
  by_suffix = {suffix: kind for kind, suffix in SHARD_SUFFIXES.items()}
  suffixes = {os.path.splitext(path)[1] for path in files}
  kinds = {by_suffix.get(suffix, "webdataset") for suffix in suffixes}
  if len(kinds) != 1:
    raise InputError(
      f"{', '.join(map(str, files))}: expected files of one type, got"
      f" {' and '.join(sorted(kinds))}."
    )
  return kinds.pop()
