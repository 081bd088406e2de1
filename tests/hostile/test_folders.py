"""Hostile folders of images with captions, through the input pipeline."""

import json
import os
import pathlib

from hostile import foreign_samples
from hostile.harness import Cases
from hostile.samples import JPEG, image_file, read_epoch

from mtv_jax.data.registry import build_source

CAPTIONS = Cases(__file__, "folders, captions")
NAMES = Cases(__file__, "folders, names and links", slow=True)
IMAGES = Cases(__file__, "folders, images")

HUGE = 1 << 40  # Bytes of a sparse file.


def _write(folder: pathlib.Path, name: str, content: bytes = JPEG) -> None:
  file = folder / name
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(content)


def _sparse(folder: pathlib.Path, name: str, size: int = HUGE) -> None:
  with open(folder / name, "wb") as file:
    file.truncate(size)


def _read(folder: pathlib.Path, captions: str = "required", **options):
  """Reads images between two good ones; "skip" if one is left out.

  Those that are left out when the folder is opened are counted in the log.
  """
  root = folder / "photos"
  for name in ("a", "z"):
    _write(root, f"{name}.jpg")
    _write(root, f"{name}.txt", b"good")
  entry = {"type": "folder", "path": str(root), "captions": captions}
  source = build_source(entry | options)
  keys = {source.read_metadata(i)["key"] for i in range(len(source))}
  assert keys >= {"a.jpg", "z.jpg"}, keys
  result = read_epoch(source)
  return ("skip", "left out") if result == 2 else result


def _add(cases, name, make, expects="skip", slow=False, **options):
  """A case whose files `make` writes into the folder of the images."""

  def run(folder):
    (folder / "photos").mkdir()
    make(folder / "photos")
    return _read(folder, **options)

  cases.add(name, run, expects=expects, slow=slow)


def _beside(suffix, make):
  """An image, and what `make` puts beside it."""

  def run(folder):
    _write(folder, "h.jpg")
    make(folder, f"h{suffix}")

  return run


_DEEP = b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
_CONTENT = {
  ".json": {
    "nested a hundred thousand deep": _DEEP,
    "objects a million deep": b'{"captions":' * 1_000_000,
    "cut": b'{"caption": "a d',
    "a list": b"[]",
    "a number of 5,000 digits": b'{"caption": ' + b"9" * 5000 + b"}",
    "captions of numbers": b'{"captions": [1, 2]}',
    "a lone surrogate": json.dumps({"caption": "\ud800"}).encode(),
    "empty": b"",
    "not UTF-8": b'{"caption": "\xff"}',
    "NUL bytes": bytes(1000),
    "40 MB": json.dumps({"caption": "dog " * 10_000_000}).encode(),
  },
  ".txt": {
    "empty": b"",
    "not UTF-8": b"\xff\xfea",
    "an encoded lone surrogate": b"a \xed\xa0\x80 dog",
    "40 MB": b"dog " * 10_000_000,
    "a JPEG": JPEG,
  },
}
_PLACES = {
  "a folder": lambda folder, name: (folder / name).mkdir(),
  "a pipe": lambda folder, name: foreign_samples.pipe(folder, name),
  "a link to itself": lambda folder, name: (folder / name).symlink_to(name),
  "a link to nothing": lambda folder, name: (folder / name).symlink_to("no"),
  "a link to /dev/zero": (
    lambda folder, name: (folder / name).symlink_to("/dev/zero")
  ),
  "a terabyte": _sparse,
}
for _suffix, _contents in _CONTENT.items():
  for _name, _data in _contents.items():
    _make = _beside(_suffix, lambda f, n, data=_data: _write(f, n, data))
    for _mode in ("required", "optional"):
      _add(
        CAPTIONS,
        f"{_suffix}, {_name}, {_mode}",
        _make,
        slow=_mode == "optional",
        captions=_mode,
      )
  for _name, _make in _PLACES.items():
    _add(CAPTIONS, f"{_suffix}, {_name}", _beside(_suffix, _make))
    _add(
      CAPTIONS,
      f"{_suffix}, {_name}, optional",
      _beside(_suffix, _make),
      # As if there were none.
      expects="used" if _name == "a folder" else "skip",
      slow=True,
      captions="optional",
    )

_LONG = "n" * 200
for _name, _file in {
  "a newline": "h\nh.jpg",
  "controls and direction marks": "h\x01\u202e.jpg",
  "quotes and braces": "h'\"{0..9}*.jpg",
  "a backslash": "h\\h.jpg",
  "two dots": "...jpg",
  "a space": " .jpg",
  "200 letters": f"{_LONG}.jpg",
  "15 folders of 200 letters": f"{_LONG}/" * 15 + "h.jpg",
  "300 folders": "d/" * 300 + "h.jpg",
}.items():

  def _named(folder, file=_file):
    _write(folder, file)
    path = folder / file
    path.with_name(path.name[:-4] + ".txt").write_bytes(b"a dog")

  _add(NAMES, f"an image, {_name}", _named, "used")
  _add(NAMES, f"an image, {_name}, ignored", _named, "used", captions="ignored")

for _mode in ("required", "optional", "ignored"):

  def _surrogate(folder):
    _write(folder, "h\udcff.jpg")
    _write(folder, "h\udcff.txt", b"a dog")

  _add(
    NAMES, f"a name that is not Unicode, {_mode}", _surrogate, captions=_mode
  )

  def _twice(folder):
    for name in ("h\udcff.jpg", "h\udcff.png"):
      _write(folder, name)

  _add(
    NAMES,
    f"two images of a name that is not Unicode, {_mode}",
    _twice,
    expects="skip" if _mode == "ignored" else "error",
    captions=_mode,
  )

for _name, _make in {
  "a link to the folder above": lambda f: (f / "sub").symlink_to(".."),
  "a link to the folder": lambda f: (f / "sub").symlink_to(f),
  "a link to itself": lambda f: (f / "sub").symlink_to("sub"),
  "a link to /proc": lambda f: (f / "sub").symlink_to("/proc"),
  "2,000 files of other kinds": lambda f: [
    (f / f"{i}.md").touch() for i in range(2_000)
  ],
  "captions without images": lambda f: _write(f, "h.txt", b"a dog"),
  "a hidden file without a name": lambda f: _write(f, ".jpg"),
}.items():
  _add(NAMES, _name, _make, "skip used")


@NAMES.add("the folder is not Unicode and empty")
def _empty(folder):
  (folder / "\udcff").mkdir()
  return build_source({"type": "folder", "path": str(folder / "\udcff")})


@NAMES.add("the folder is not Unicode and missing")
def _missing(folder):
  return build_source({"type": "folder", "path": str(folder / "\udcff")})


for _name in ("/dev/zero", "/proc/self/mem", "a\0b", "x" * 5000, ""):
  NAMES.add(
    f"the folder is {_name[:20]!r}",
    lambda folder, name=_name: build_source({"type": "folder", "path": name}),
  )


for _name, _data in {
  "empty": b"",
  "a text": b"a dog",
  "half": JPEG[: len(JPEG) // 2],
  "a PNG of 60,000 by 60,000": (
    image_file("PNG")[:16]
    + (60_000).to_bytes(4, "big") * 2
    + image_file("PNG")[24:]
  ),
  "an archive": b"PK\x03\x04" + bytes(1000),
}.items():

  def _image(folder, data=_data):
    _write(folder, "h.jpg", data)
    _write(folder, "h.txt", b"a dog")

  _add(IMAGES, _name, _image)
  _add(IMAGES, f"{_name}, ignored", _image, slow=True, captions="ignored")


for _name, _make in _PLACES.items():

  def _place(folder, make=_make):
    make(folder, "h.jpg")
    _write(folder, "h.txt", b"a dog")

  # A folder is no image; the others are named, but for an absurd size.
  _expects = {"a folder": "skip", "a terabyte": "skip"}.get(_name, "error")
  _add(IMAGES, _name, _place, _expects)

for _name, _change in {
  "removed": lambda file: file.unlink(),
  "replaced by a folder": lambda file: (file.unlink(), file.mkdir()),
  "replaced by a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
  "replaced by a terabyte": lambda file: os.truncate(file, HUGE),
  "replaced by a link to itself": (
    lambda file: (file.unlink(), file.symlink_to(file.name))
  ),
}.items():

  @IMAGES.add(f"an image is {_name} after the start", expects="skip")
  def _changed(folder, change=_change):
    for name in ("a", "h", "z"):
      _write(folder, f"{name}.jpg")
    entry = {"type": "folder", "path": str(folder), "captions": "ignored"}
    source = build_source(entry)
    change(folder / "h.jpg")
    return read_epoch(source)


for _name, _text in {
  "a name of 5,000 letters": "image,caption\n" + "x" * 5000 + ",a dog\n",
  "a name with a NUL": "image,caption\na\0b.jpg,a dog\n",
  "a name that is a folder": "image,caption\n.,a dog\n",
  "a device": "image,caption\n/dev/zero,a dog\n",
}.items():

  @IMAGES.add(f"a table with {_name}")
  def _table(folder, text=_text):
    (folder / "x.csv").write_text(text)
    return build_source({"type": "folder", "path": str(folder / "x.csv")})


@IMAGES.add("a table of a terabyte in one line")
def _line(folder):
  _sparse(folder, "x.csv")
  with open(folder / "x.csv", "r+b") as file:
    file.write(b"image,caption\n")
  return build_source({"type": "folder", "path": str(folder / "x.csv")})


@IMAGES.add("COCO's captions of a terabyte")
def _coco(folder):
  _sparse(folder, "x.json")
  return build_source({"type": "folder", "path": str(folder / "x.json")})


@CAPTIONS.parametrize
def test_captions(case, hostile):
  hostile(case)


@NAMES.parametrize
def test_names_and_links(case, hostile):
  hostile(case)


@IMAGES.parametrize
def test_images(case, hostile):
  hostile(case)
