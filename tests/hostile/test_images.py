"""Hostile image files: damaged, absurd in size, slow to decode."""

import io
import struct
import zlib

import cv2
import numpy as np
from hostile.harness import Cases, run_all
from hostile.samples import (
  BROKEN_BYTES,
  DAMAGED_BYTES,
  JPEG,
  chunk,
  ihdr,
  image_file,
  png,
  read_record,
)
from PIL import Image

from mtv_jax.data import canvas
from mtv_jax.data.records import BadRecord

DAMAGED = Cases(__file__, "images, damaged")
SIZES = Cases(__file__, "images, absurd sizes")
SLOW = Cases(__file__, "images, slow to decode")
LIMITS = Cases(__file__, "images within the limits", fast=1)
IN_RUNS = Cases(__file__, "images in the pipeline")


def _decode(folder, data):
  """Decodes as training does and, files that start as JPEGs, every pixel too.

  The canvas is small, so that JPEGs of 16 x 12 are decoded at a half.
  """
  data = data() if callable(data) else data
  decoders = [lambda: canvas.decode_to_canvas(data, 4, key="k")[0]]
  if data[:1] == b"\xff":
    decoders.append(lambda: canvas.squash(canvas.decode(data, key="k"), 4))
  outcomes = []
  for decode in decoders:
    try:
      outcomes.append(decode().shape)
    except BadRecord as error:
      outcomes.append(error)
  reasons = {getattr(outcome, "reason", None) for outcome in outcomes}
  assert len(reasons) == 1, reasons
  if isinstance(outcomes[0], BadRecord):
    raise outcomes[0]


def _png(*chunks: bytes, **fields) -> bytes:
  """A PNG with further chunks before its pixels."""
  return png(ihdr(**fields), *chunks, PIXELS, IEND)


PIXELS = chunk(b"IDAT", zlib.compress(bytes(310)))
IEND = chunk(b"IEND")

for _format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
  _data = image_file(_format, (64, 48))
  _broken = {k: change(_data) for k, change in BROKEN_BYTES.items()}
  _odd = {k: change(_data) for k, change in DAMAGED_BYTES.items()}
  DAMAGED.add_table(_decode, _broken, prefix=f"{_format}, ", expects="skip")
  DAMAGED.add_table(_decode, _odd, prefix=f"{_format}, ", expects="skip used")
DAMAGED.add_table(
  _decode,
  {
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "a video": b"\0\0\0\x18ftypmp42" + bytes(100),
  },
  expects="skip",
)
DAMAGED.add_table(
  _decode,
  {
    "PNG without IDAT": png(ihdr(), IEND),
    "PNG of checksum 0": png(chunk(b"IHDR", ihdr()[8:21], 0), PIXELS, IEND),
    "PNG of colour 7": _png(colour=7),
    "PNG of 3 bits": _png(bits=3),
    "PNG of a chunk of 2^31": png(ihdr(), b"\x80\0\0\0IDAT", bytes(100)),
    "PNG of a palette of 1 byte": _png(chunk(b"PLTE", b"\0"), colour=3),
    "PNG that isn't zlib": png(ihdr(), chunk(b"IDAT", bytes(310)), IEND),
  },
  expects="skip used",
)


# --- Sizes -------------------------------------------------------------------


def _jpeg_of(width: int, height: int) -> bytes:
  at = JPEG.index(b"\xff\xc0")
  size = struct.pack(">HH", height, width)
  return JPEG[: at + 5] + size + JPEG[at + 9 :]


def _bmp(width: int, height: int, *, bits=24, compression=0) -> bytes:
  fields = 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0
  info = struct.pack("<IiiHHIIiiII", *fields)
  return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54) + info + bytes(2000)


def _tiff(entries: dict[int, tuple[int, int]], data=b"") -> bytes:
  """A little-endian TIFF: (count, value) of tags, all of type LONG."""
  body = b"".join(
    struct.pack("<HHII", tag, 4, count, value)
    for tag, (count, value) in sorted(entries.items())
  )
  ifd = struct.pack("<H", len(entries)) + body + bytes(4)
  return b"II*\0" + struct.pack("<I", 8) + ifd + data


def _grey_tiff(width: int, height: int, **tags) -> bytes:
  entries = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 278: 1}
  entries = {tag: (1, value) for tag, value in entries.items()}
  return _tiff(entries | {279: (1, 100)}, bytes(200))


def _webp_canvas(width: int, height: int) -> bytes:
  """An animated WebP of one frame of 4x4 on a large canvas."""
  frame_data = image_file("WEBP", (4, 4), "RGBA", lossless=True)[12:]
  sides = [(n - 1).to_bytes(3, "little") for n in (width, height, 4, 4)]
  frame = bytes(6) + sides[2] + sides[3] + bytes(4) + frame_data
  parts = {b"VP8X": b"\x12\0\0\0" + sides[0] + sides[1]}
  parts |= {b"ANIM": bytes(6), b"ANMF": frame}
  body = b"".join(
    kind + struct.pack("<I", len(part)) + part for kind, part in parts.items()
  )
  return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _ppm_of(width: int, height: int) -> bytes:
  return f"P6 {width} {height} 255\n".encode() + bytes(100)


def _gif_of(width: int, height: int) -> bytes:
  data = bytearray(image_file("GIF"))
  data[6:10] = struct.pack("<HH", width, height)
  return bytes(data)


_MAX = 2**31 - 1
for _format, (_make, _sides) in {
  "JPEG": (_jpeg_of, [(65_535, 65_535), (0, 12), (16, 0)]),
  "PNG": (
    lambda *size: png(ihdr(*size), PIXELS, IEND),
    [(_MAX, _MAX), (2**32 - 1, 2**32 - 1), (0, 0), (100_000, 1), (7000, 7000)],
  ),
  "WebP": (_webp_canvas, [(16_383, 16_383), (8900, 8900)]),
  "GIF": (_gif_of, [(65_535, 65_535)]),
  "BMP": (_bmp, [(0, 0), (-5, 5), (_MAX, _MAX), (10, -(2**31)), (6000, 6000)]),
  "TIFF": (_grey_tiff, [(2**32 - 1, 2**32 - 1), (0, 0), (6000, 6000)]),
  "PPM": (_ppm_of, [(0, 0), (-5, 5), (10**9, 10**9), (10**20, 1)]),
}.items():
  _images = {f"{w} x {h}": _make(w, h) for w, h in _sides}
  SIZES.add_table(_decode, _images, prefix=f"{_format}, ", expects="skip")
SIZES.add_table(
  _decode,
  {
    "TIFF of 65,535 tags": b"II*\0\x08\0\0\0\xff\xff" + bytes(1000),
    "TIFF beyond its end": b"II*\0\xff\xff\xff\x7f" + bytes(100),
    "BigTIFF of 2^60 tags": b"II+\0\x08\0\0\0\x10" + bytes(7) + b"\xff" * 80,
    "PPM of maximum 0": b"P6 5 5 0\n" + bytes(100),
    "PPM of a name that does not end": b"P6 " + b"1" * 100_000,
    "float TIFF": image_file("TIFF", mode="F"),
  },
  expects="skip",
)
_large = {"a file of 300 MB": lambda: JPEG.ljust(300 << 20, b"\0")}
SIZES.add_table(_decode, _large, expects="skip", match="314,572,800 bytes")


# --- Slow --------------------------------------------------------------------


def _scans(count: int, side: int, mode="L") -> bytes:
  """A progressive JPEG whose last scan is repeated."""
  data = io.BytesIO()
  Image.new(mode, (side, side), 128).save(data, "JPEG", progressive=True)
  data = data.getvalue()
  scan = data[data.rindex(b"\xff\xda") : -2]
  return data[:-2] + scan * count + b"\xff\xd9"


def _with_comment(count: int) -> bytes:
  """A comment with an end marker lies between the scans."""
  data = _scans(count, 2000)
  at = data.rindex(b"\xff\xda", 0, len(data) // 2)
  return data[:at] + b"\xff\xfe\x00\x06\xff\xd9\xff\xd9" + data[at:]


def _flat_png(width: int, height: int, channels: int, **fields) -> bytes:
  rows = bytes(height * (1 + width * channels * fields.get("bits", 8) // 8))
  idat = chunk(b"IDAT", zlib.compress(rows))
  return png(ihdr(width, height, **fields), idat, IEND)


def _many_chunks(kind: bytes, data: bytes, count=200_000) -> bytes:
  return _png(*[chunk(kind, data)] * count)


def _ppm(head: bytes, size: int, fill=b"1 ") -> bytes:
  return head + b"\n" + fill * (size // len(fill))


def _gif_with(blocks: bytes) -> bytes:
  data = image_file("GIF")
  at = data.index(b"!\xf9") if b"!\xf9" in data else data.index(b",")
  return data[:at] + blocks + data[at:]


def _strips(count: int) -> bytes:
  entries = {256: 1, 257: count, 258: 8, 259: 1, 262: 1, 277: 1, 278: 1}
  entries = {tag: (1, value) for tag, value in entries.items()}
  at = 8 + 2 + 12 * (len(entries) + 2) + 4
  entries |= {273: (count, at), 279: (count, at)}
  return _tiff(entries, struct.pack("<I", 1) * count)


_GIF_COMMENT = b"!\xfe\x01a\0"
for _name, _make, *_arguments in (
  ("JPEG of 3,000 scans", _scans, 3000, 2000),
  ("JPEG of 3,000 scans, an end in a comment", _with_comment, 3000),
  ("PNG of 200,000 unknown chunks", _many_chunks, b"abCd", b"a"),
  ("GIF of 400,000 comments", _gif_with, _GIF_COMMENT * 400_000),
  ("GIF of 2^22 blocks", _gif_with, b"!\xfe" + b"\x01a" * (1 << 22) + b"\0"),
  ("TIFF of 4,000,000 strips", _strips, 4_000_000),
  ("PBM of text, ten million pixels", _ppm, b"P1 4000 2500", 10 << 20),
  ("PPM of 16 bits, four million", _ppm, b"P6 2000 2000 65535", 24 << 20),
  ("PPM of text, 50 MB of blanks", _ppm, b"P3 10 10 255", 50 << 20, b" "),
  ("PPM of text, a comment of 50 MB", _ppm, b"P3 10 10 255\n#", 50 << 20),
):
  SLOW.add(
    _name, lambda _, m=_make, a=_arguments: _decode(_, m(*a)), expects="skip"
  )
_ends = {
  "PNG of 200,000 chunks at its end": png(
    ihdr(), PIXELS, *[chunk(b"iTXt", b"a\0\0\0\0\0b")] * 200_000, IEND
  )
}
_ends["BMP of run lengths"] = (
  _bmp(3000, 3000, bits=8, compression=1) + b"\1\2" * 9_000_000
)
SLOW.add_table(_decode, _ends, expects="skip")


_BOMB, _MEGABYTE = (zlib.compress(bytes(1 << bits)) for bits in (27, 20))
SLOW.add_table(
  _decode,
  {
    "a text of 128 MB": _png(chunk(b"zTXt", b"a\0\0" + _BOMB)),
    "a profile of 128 MB": _png(chunk(b"iCCP", b"a\0\0" + _BOMB)),
    "UTF-8 of 128 MB": _png(chunk(b"iTXt", b"a\0\1\0\0\0" + _BOMB)),
    "60 texts of 1 MB": _png(*[chunk(b"zTXt", b"a\0\0" + _MEGABYTE)] * 60),
    "more pixels than its size": png(ihdr(), chunk(b"IDAT", _BOMB), IEND),
  },
  prefix="PNG of ",
  expects="skip used",
)
_JPEG_OF_80 = np.zeros((8800, 9000, 3), np.uint8)
_images = {
  "JPEG of 40 scans of 16 million": lambda: _scans(40, 4000),
  "PNG of 40 million pixels": lambda: _flat_png(6300, 6300, 3),
  "PNG with alpha": lambda: _flat_png(6300, 6300, 4, colour=6),
  "PNG of 16 bits": lambda: _flat_png(6300, 6300, 1, colour=0, bits=16),
  "WebP of 40 million pixels": lambda: _webp_canvas(6300, 6300),
  "JPEG of 80 million pixels": lambda: cv2.imencode(".jpg", _JPEG_OF_80)[
    1
  ].tobytes(),
  "PNG of 65,535 x 600": lambda: _flat_png(65_535, 600, 3),
}
LIMITS.add_table(_decode, _images, expects="used")


IN_RUNS.add_table(
  lambda folder, data: read_record(folder, image=data),
  {
    "a JPEG cut short": JPEG[:-50],
    "a PNG of 10^18 pixels": png(ihdr(2**30, 2**30), PIXELS, IEND),
    "a JPEG of 3,000 scans": _scans(3000, 64),
    "a GIF of comments": _gif_with(_GIF_COMMENT * 400_000),
  },
  expects="skip",
  match="h: ",
)

test_images = run_all(DAMAGED, SIZES, SLOW, LIMITS, IN_RUNS)
