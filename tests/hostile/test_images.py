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
  image_file,
  read_record,
)
from PIL import Image

from mtv_jax.data import canvas
from mtv_jax.data.records import BadRecord

DAMAGED = Cases(__file__, "images, damaged")
SIZES = Cases(__file__, "images, absurd sizes")
SLOW = Cases(__file__, "images, slow to decode")
IN_RUNS = Cases(__file__, "images in the pipeline", every=2)


def _decode(folder, data):
  """Decodes as training does and, files that start as JPEGs, every pixel too.

  The canvas is small, so that JPEGs of 16 x 12 are decoded at a half.
  """
  data = data() if callable(data) else data
  outcomes = []
  for decode in (_decode_to_canvas, _decode_fully)[: 1 + (data[:1] == b"\xff")]:
    try:
      outcomes.append(decode(data))
    except BadRecord as error:
      outcomes.append(error)
  reasons = {getattr(outcome, "reason", None) for outcome in outcomes}
  assert len(reasons) == 1, reasons
  if isinstance(outcomes[0], BadRecord):
    raise outcomes[0]
  return outcomes[0]


def _decode_to_canvas(data):
  return canvas.decode_to_canvas(data, 4, key="k")[0].shape


def _decode_fully(data):
  return canvas.squash(canvas.decode(data, key="k"), 4).shape


def chunk(kind: bytes, data: bytes = b"", checksum: int | None = None) -> bytes:
  """A chunk of a PNG."""
  if checksum is None:
    checksum = zlib.crc32(kind + data)
  return (
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
  )


def png(*chunks: bytes) -> bytes:
  """A PNG of chunks."""
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def ihdr(width=10, height=10, bits=8, colour=2, interlace=0) -> bytes:
  """The header chunk of a PNG."""
  fields = width, height, bits, colour, 0, 0, interlace
  return chunk(b"IHDR", struct.pack(">IIBBBBB", *fields))


PIXELS = chunk(b"IDAT", zlib.compress(bytes(310)))
IEND = chunk(b"IEND")

for _format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
  _data = image_file(_format, (64, 48))
  for _changes, _expects in (
    (BROKEN_BYTES, "skip"),
    (DAMAGED_BYTES, "skip used"),
  ):
    DAMAGED.add_table(
      _decode,
      {name: change(_data) for name, change in _changes.items()},
      prefix=f"{_format}, ",
      expects=_expects,
    )
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
    "PNG of colour 7": png(ihdr(colour=7), PIXELS, IEND),
    "PNG of 3 bits": png(ihdr(bits=3), PIXELS, IEND),
    "PNG of a chunk of 2^31": png(ihdr(), b"\x80\0\0\0IDAT", bytes(100)),
    "PNG of a palette of 1 byte": png(
      ihdr(colour=3), chunk(b"PLTE", b"\0"), PIXELS, IEND
    ),
    "PNG that isn't zlib": png(ihdr(), chunk(b"IDAT", bytes(310)), IEND),
  },
  expects="skip used",
)


def _decode_exif(folder, exif):
  exif = b"Exif\0\0" + exif
  return _decode(folder, image_file("JPEG", (16, 12), exif=exif))


def _orientation(entry: bytes) -> bytes:
  """EXIF of one entry, after its tag."""
  return b"MM\0*\0\0\0\x08\0\x01\x01\x12" + entry


DAMAGED.add_table(
  _decode_exif,
  {
    "cut": b"II*\0",
    "noise": np.random.default_rng(2).bytes(200),
    "a loop of directories": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "65,535 entries": b"MM\0*\0\0\0\x08\xff\xff" + bytes(100),
    "an orientation of 99": _orientation(b"\0\x03\0\0\0\x01\0\x63" + bytes(6)),
    "an orientation of text": _orientation(b"\0\x02\0\0\0\x04abc\0" + bytes(4)),
    "a count of 2^32 - 1": _orientation(b"\0\x03" + b"\xff" * 8),
  },
  prefix="EXIF, ",
  expects="used skip",
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


def _gif_of(width: int, height: int) -> bytes:
  data = bytearray(image_file("GIF"))
  data[6:10] = struct.pack("<HH", width, height)
  return bytes(data)


SIZES.add_table(
  _decode,
  {
    "JPEG of 65,535 x 65,535": _jpeg_of(65_535, 65_535),
    "JPEG of 0 x 12": _jpeg_of(0, 12),
    "JPEG of 16 x 0": _jpeg_of(16, 0),
    "PNG of 2^31 - 1": png(ihdr(2**31 - 1, 2**31 - 1), PIXELS, IEND),
    "PNG of 2^32 - 1": png(ihdr(2**32 - 1, 2**32 - 1), PIXELS, IEND),
    "PNG of 0 x 0": png(ihdr(0, 0), PIXELS, IEND),
    "PNG of 100,000 x 1": png(ihdr(100_000, 1), PIXELS, IEND),
    "PNG of 7,000 x 7,000": png(ihdr(7000, 7000), PIXELS, IEND),
    "WebP of 16,383 x 16,383": _webp_canvas(16_383, 16_383),
    "WebP of 8,900 x 8,900": _webp_canvas(8900, 8900),
    "GIF of 65,535 x 65,535": _gif_of(65_535, 65_535),
    "BMP of 0 x 0": _bmp(0, 0),
    "BMP of -5 x 5": _bmp(-5, 5),
    "BMP of 2^31 - 1": _bmp(2**31 - 1, 2**31 - 1),
    "BMP of height -2^31": _bmp(10, -(2**31)),
    "BMP of 6,000 x 6,000, cut": _bmp(6000, 6000),
    "TIFF of 2^32 - 1": _grey_tiff(2**32 - 1, 2**32 - 1),
    "TIFF of 0 x 0": _grey_tiff(0, 0),
    "TIFF of 6,000 x 6,000, cut": _grey_tiff(6000, 6000),
    "TIFF without tags": _tiff({}),
    "TIFF of 65,535 tags": b"II*\0\x08\0\0\0\xff\xff" + bytes(1000),
    "TIFF beyond its end": b"II*\0\xff\xff\xff\x7f" + bytes(100),
    "BigTIFF of 2^60 tags": b"II+\0\x08\0\0\0\x10" + bytes(7) + b"\xff" * 80,
    "PPM of 0 x 0": b"P6 0 0 255\n",
    "PPM of -5 x 5": b"P6 -5 5 255\n" + bytes(100),
    "PPM of 10^9 x 10^9": b"P6 1000000000 1000000000 255\n" + bytes(100),
    "PPM of 10^20": b"P6 100000000000000000000 1 255\n" + bytes(100),
    "PPM of maximum 0": b"P6 5 5 0\n" + bytes(100),
    "PPM of a name that does not end": b"P6 " + b"1" * 100_000,
    "float TIFF": image_file("TIFF", mode="F"),
  },
  expects="skip",
)


SIZES.add_table(
  _decode,
  {"a file of 300 MB": lambda: JPEG.ljust(300 << 20, b"\0")},
  expects="skip",
  match="314,572,800 bytes",
)


# --- Slow --------------------------------------------------------------------


def _scans(count: int, side: int, *, mode="L") -> bytes:
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
  return png(ihdr(), *[chunk(kind, data)] * count, PIXELS, IEND)


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


SLOW.add_table(
  _decode,
  {
    "JPEG of 3,000 scans": lambda: _scans(3000, 2000),
    "JPEG of 500 scans of 16 million": lambda: _scans(500, 4000),
    "JPEG of 3,000 scans, an end in a comment": lambda: _with_comment(3000),
    "JPEG of CMYK, 3,000 scans": lambda: _scans(3000, 1000, mode="CMYK"),
    "PNG of 1,000,000 IDAT": lambda: _many_chunks(b"IDAT", b"x", 1_000_000),
    "PNG of 200,000 texts": lambda: _many_chunks(b"tEXt", b"a\0b"),
    "PNG of 200,000 unknown chunks": lambda: _many_chunks(b"abCd", b"a"),
    "PNG of 200,000 chunks at its end": lambda: png(
      ihdr(), PIXELS, *[chunk(b"iTXt", b"a\0\0\0\0\0b")] * 200_000, IEND
    ),
    "GIF of 400,000 comments": lambda: _gif_with(b"!\xfe\x01a\0" * 400_000),
    "GIF of a comment of 4,000,000 blocks": lambda: _gif_with(
      b"!\xfe" + b"\x01a" * 4_000_000 + b"\0"
    ),
    "GIF of 400,000 controls": lambda: _gif_with(
      b"!\xf9\x04\0\0\0\0\0" * 400_000
    ),
    "GIF of 5,000,000 bytes between blocks": lambda: _gif_with(
      b"\0" * 5_000_000
    ),
    "TIFF of 4,000,000 strips": lambda: _strips(4_000_000),
    "PPM of text, a million pixels": lambda: _ppm(b"P3 1000 1000 255", 6 << 20),
    "PBM of text, ten million pixels": lambda: _ppm(b"P1 4000 2500", 10 << 20),
    "PPM of 16 bits, four million": lambda: _ppm(
      b"P6 2000 2000 65535", 24 << 20
    ),
    "PPM of maximum 100, four million": lambda: _ppm(
      b"P6 2000 2000 100", 12 << 20
    ),
    "PPM of text and 50 MB of blanks": lambda: _ppm(
      b"P3 10 10 255", 50 << 20, b" "
    ),
    "PPM of a comment of 50 MB": lambda: _ppm(b"P3 10 10\n#", 50 << 20),
    "PPM of text and a comment of 50 MB": lambda: _ppm(
      b"P3 10 10 255\n#", 50 << 20
    ),
    "BMP of run lengths": lambda: (
      _bmp(3000, 3000, bits=8, compression=1) + b"\1\2" * 9_000_000
    ),
  },
  expects="skip",
)

_BOMB = b"a\0\0" + zlib.compress(bytes(1 << 27))
SLOW.add_table(
  _decode,
  {
    "PNG of a text of 128 MB": png(ihdr(), chunk(b"zTXt", _BOMB), PIXELS, IEND),
    "PNG of a profile of 128 MB": png(
      ihdr(), chunk(b"iCCP", _BOMB), PIXELS, IEND
    ),
    "PNG of an international text of 128 MB": png(
      ihdr(), chunk(b"iTXt", b"a\0\1\0\0\0" + _BOMB[3:]), PIXELS, IEND
    ),
    "PNG of 60 texts of 1 MB": png(
      ihdr(),
      *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 60,
      PIXELS,
      IEND,
    ),
    "PNG of more pixels than its size": png(
      ihdr(), chunk(b"IDAT", zlib.compress(bytes(1 << 27))), IEND
    ),
  },
  expects="skip used",
)

SLOW.add_table(
  _decode,
  {
    "JPEG of 50 scans of 16 million": lambda: _scans(40, 4000),
    "PNG of 40 million pixels": lambda: _flat_png(6300, 6300, 3),
    "PNG of 40 million pixels with alpha": lambda: _flat_png(
      6300, 6300, 4, colour=6
    ),
    "PNG of 40 million of 16 bits": lambda: _flat_png(
      6300, 6300, 1, colour=0, bits=16
    ),
    "WebP of 40 million pixels": lambda: _webp_canvas(6300, 6300),
    "JPEG of 80 million pixels": lambda: cv2.imencode(
      ".jpg", np.zeros((8800, 9000, 3), np.uint8)
    )[1].tobytes(),
    "PNG of 65,535 x 600": lambda: _flat_png(65_535, 600, 3),
    "PNG of 1 x 65,535": lambda: _flat_png(1, 65_535, 3),
  },
  prefix="within the limits, ",
  expects="used",
  slow=True,
)


def _read_image(folder, data):
  return read_record(folder, image=data)


IN_RUNS.add_table(
  _read_image,
  {
    "a JPEG cut short": JPEG[:-50],
    "a web page": b"<html>404</html>",
    "a PNG of 10^18 pixels": png(ihdr(2**30, 2**30), PIXELS, IEND),
    "a JPEG of 3,000 scans": _scans(3000, 64),
    "a GIF of comments": _gif_with(b"!\xfe\x01a\0" * 400_000),
    "random bytes": np.random.default_rng(3).bytes(3000),
  },
  expects="skip",
  match="h: ",
)

test_images = run_all(DAMAGED, SIZES, SLOW, IN_RUNS)
