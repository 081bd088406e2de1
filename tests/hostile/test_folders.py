"""Hostile folders of images with captions, through the input pipeline."""

import functools
import os
import pathlib

from hostile.harness import Cases, run_all
from hostile.samples import (
  BROKEN_BYTES,
  JPEG,
  PLACES,
  as_bytes,
  image_file,
  read_epoch,
  sparse,
)

from mtv_jax.data.registry import build_source

CAPTIONS = Cases(__file__, "folders, captions")
NAMES = Cases(__file__, "folders, names and links")
IMAGES = Cases(__file__, "folders, images")

MODES = ("required", "optional", "ignored")


def _write(file: pathlib.Path, content: bytes = JPEG) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(content)


def _read(folder: pathlib.Path, make, captions: str = "required"):
  """Reads a folder that `make` writes to, with two good images.

  "skip" if an image is left out: images left out when the folder is
  opened are counted in the log.
  """
  root = folder / "photos"
  for name in ("a", "z"):
    _write(root / f"{name}.jpg")
    _write(root / f"{name}.txt", b"good")
  make(root)
  entry = {"type": "folder", "path": str(root), "captions": captions}
  source = build_source(entry)
  keys = {source.read_metadata(i)["key"] for i in range(len(source))}
  assert keys >= {"a.jpg", "z.jpg"}, keys
  result = read_epoch(source)
  return ("skip", "left out") if result == 2 else result


def _add(cases, makes, modes, expects="skip", prefix=""):
  """Cases of the files that `makes` write, in each caption mode."""
  for mode in modes:
    read = functools.partial(_read, captions=mode)
    suffixed = {f"{name}, {mode}": make for name, make in makes.items()}
    cases.add_table(read, suffixed, prefix=prefix, expects=expects)


def _beside(suffix, make):
  """An image, and the path that `make` creates next to it."""

  def run(folder):
    _write(folder / "h.jpg")
    make(folder / f"h{suffix}")

  return run


def _content(data):
  return lambda file: _write(file, as_bytes(data))


# `test_captions.py` has more content of a .json and a .txt.
for _suffix, _contents in {
  ".json": {
    "objects a million deep": b'{"captions":' * 1_000_000,
    "cut": b'{"caption": "a d',
    "a list": [],
    "captions of numbers": {"captions": [1, 2]},
    "a lone surrogate": {"caption": "\ud800"},
    "40 MB": {"caption": "dog " * 10_000_000},
  },
  ".txt": {
    "empty": b"",
    "not UTF-8": b"\xff\xfea",
    "40 MB": b"dog " * 10_000_000,
  },
}.items():
  _makes = {k: _beside(_suffix, _content(v)) for k, v in _contents.items()}
  _add(CAPTIONS, _makes, MODES[:2], prefix=f"{_suffix}, ")
  _places = {k: _beside(_suffix, make) for k, make in PLACES.items()}
  _folder = {"a folder": _places.pop("a folder")}
  _add(CAPTIONS, _places, MODES[:2], prefix=f"{_suffix}, ")
  # Treated as missing.
  _add(CAPTIONS, _folder, MODES[:1], prefix=f"{_suffix}, ")
  _add(CAPTIONS, _folder, MODES[1:2], "used", prefix=f"{_suffix}, ")


def _named(file):
  def make(folder):
    _write(folder / file)
    _write((folder / file).with_name((folder / file).name[:-4] + ".txt"), b"a")

  return make


_LONG = "n" * 200
_NAMES = {
  "a newline": "h\nh.jpg",
  "controls and direction marks": "h\x01\u202e.jpg",
  "200 letters": f"{_LONG}.jpg",
  "15 folders of 200 letters": f"{_LONG}/" * 15 + "h.jpg",
  "300 folders": "d/" * 300 + "h.jpg",
}
_makes = {name: _named(file) for name, file in _NAMES.items()}
_add(NAMES, _makes, MODES[::2], "used", prefix="a name of ")
_add(NAMES, {"a name that is not Unicode": _named("h\udcff.jpg")}, MODES)


def _twice(folder):
  for suffix in (".jpg", ".png", ".txt"):
    _write(folder / f"h\udcff{suffix}")


_add(NAMES, {"two images of a name, no Unicode": _twice}, MODES[:2], "error")
_add(NAMES, {"two images of a name, no Unicode": _twice}, MODES[2:])


def _many(folder):
  for i in range(2000):
    (folder / f"{i}.md").touch()


_add(
  NAMES,
  {
    "a link to the folder above": lambda f: (f / "sub").symlink_to(".."),
    "a link to itself": lambda f: (f / "sub").symlink_to("sub"),
    "a link to /proc": lambda f: (f / "sub").symlink_to("/proc"),
    "2,000 files of other kinds": _many,
    "a hidden file without a name": lambda f: _write(f / ".jpg"),
  },
  MODES[:1],
  "skip used",
)


def _build(folder, name):
  (folder / "empty\udcff").mkdir()
  return build_source({"type": "folder", "path": name})


_FOLDERS = ("empty\udcff", "no\udcff", "/dev/zero", "/proc/self/mem", "a\0b")
NAMES.add_table(
  _build, {ascii(name)[:20]: name for name in (*_FOLDERS, "x" * 5000, "")}
)


def _captioned(make):
  def run(folder):
    make(folder / "h.jpg")
    _write(folder / "h.txt", b"a dog")

  return run


_PNG = image_file("PNG")
_DATA = {name: change(JPEG) for name, change in BROKEN_BYTES.items()}
_DATA["a PNG of 60,000 x 60,000"] = (
  _PNG[:16] + (60_000).to_bytes(4, "big") * 2 + _PNG[24:]
)
_makes = {name: _captioned(_content(data)) for name, data in _DATA.items()}
_add(IMAGES, _makes, MODES[::2])
_makes = {name: _captioned(make) for name, make in PLACES.items()}
# A folder is not an image; the rest are named, except an absurd size.
_skipped = {name: _makes.pop(name) for name in ("a folder", "a terabyte")}
_add(IMAGES, _makes, MODES[:1], "error")
_add(IMAGES, _skipped, MODES[:1])


def _change_later(folder, change):
  """An image changes after the folder was opened."""
  for name in ("a", "h", "z"):
    _write(folder / f"{name}.jpg")
  entry = {"type": "folder", "path": str(folder), "captions": "ignored"}
  source = build_source(entry)
  (folder / "h.jpg").unlink()
  change(folder / "h.jpg")
  return read_epoch(source)


IMAGES.add_table(
  _change_later,
  PLACES | {"removed": lambda file: None},
  prefix="later ",
  expects="skip",
)


def _read_table(folder, text):
  (folder / "x.csv").write_text("image,caption\n" + text)
  return build_source({"type": "folder", "path": str(folder / "x.csv")})


IMAGES.add_table(
  _read_table,
  {
    "a name of 5,000 letters": "x" * 5000 + ",a dog\n",
    "a name with a NUL": "a\0b.jpg,a dog\n",
    "a name that is a folder": ".,a dog\n",
    "a device": "/dev/zero,a dog\n",
  },
  prefix="a table with ",
)


def _read_sparse(folder, name):
  """A listing of a terabyte, in one line."""
  sparse(folder / name)
  if name.endswith("csv"):
    with open(folder / name, "r+b") as file:
      file.write(b"image,caption\n")
  assert os.path.getsize(folder / name) > 1 << 39
  return build_source({"type": "folder", "path": str(folder / name)})


IMAGES.add_table(
  _read_sparse, {"a table": "x.csv", "COCO": "x.json"}, prefix="a terabyte of "
)

test_folders = run_all(CAPTIONS, NAMES, IMAGES)
