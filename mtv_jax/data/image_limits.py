"""Limits on the work of decoding an image, checked from the file's structure.

Decoders take time per scan of a JPEG, and Pillow per chunk of a PNG, block of a
GIF or strip of a TIFF, so a small file can take minutes. The limits are far
above what encoders write.
"""

import re
import struct

from PIL import Image

from mtv_jax.data.records import BadRecord

# 80 million pixels of 8-bit RGB are 240 MB uncompressed.
MAX_BYTES = 1 << 28
# A progressive JPEG has about ten scans. At 80 million pixels each takes 0.1 s.
MAX_SCANS = 50
# Chunks of a PNG, blocks before the first image of a GIF, strips of a TIFF.
MAX_PARTS = 100_000
# Pixels in formats that Pillow decodes in Python, at 1 us or more each: plain,
# 16-bit colour and other rare PPM, and run-length encoded BMP.
MAX_SLOW_PIXELS = 1 << 18
# Maximum side of a JPEG.
MAX_SIDE = 65_535
# Bytes of a PPM header, comments included.
_MAX_HEADER = 4096
# Bytes per pixel of a plain (text) PPM.
_MAX_TEXT = 32

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SOS, _EOI = 0xDA, 0xD9
# TIFF tags with offsets and sizes of strips and tiles.
_STRIP_TAGS = (273, 279, 324, 325)


def check_file(data: bytes, key: str) -> None:
  """Rejects a file that is too large or slow to decode."""
  if len(data) > MAX_BYTES:
    raise _limit_error(key, len(data), "bytes", MAX_BYTES)
  if data[:2] == b"\xff\xd8":
    # Fast, but also counts bytes that are not markers: parse if too many.
    if data.count(b"\xff\xda") > MAX_SCANS:
      _check_count(key, _count_scans(data), "scans", MAX_SCANS)
  elif data[:8] == b"\x89PNG\r\n\x1a\n":
    _check_count(key, _count_chunks(data), "chunks", MAX_PARTS)
  elif data[:4] == b"GIF8":
    _check_count(key, _count_blocks(data), "blocks", MAX_PARTS)
  elif data[:1] == b"P" and data[1:2] in b"123456":
    # Pillow reads the header byte by byte.
    header = re.sub(rb"#[^\r\n]*", b"", data[:_MAX_HEADER])
    if len(header.split()) < 4 and len(data) > _MAX_HEADER:
      raise _limit_error(key, _MAX_HEADER + 1, "bytes of header", _MAX_HEADER)
  elif data[:2] in (b"II", b"MM"):
    _check_count(key, _count_strips(data), "strips or tiles", MAX_PARTS)


def check_size(width: int, height: int, key: str, max_pixels: int) -> None:
  """Rejects an image whose header states too many pixels."""
  if width * height > max_pixels or max(width, height) > MAX_SIDE:
    raise BadRecord(
      key,
      f"the image is {width}x{height}; expected at most"
      f" {max_pixels / 1e6:.0f} million pixels and {MAX_SIDE} per side",
    )


def check_opened(
  image: Image.Image, size: int, key: str, max_pixels: int
) -> None:
  """Rejects an opened image that is too large or slow to decode in Pillow.

  `size` is in bytes. `max_pixels` is for JPEGs; other formats take twice the
  time and memory, so their limit is half of it.
  """
  is_jpeg = image.format in ("JPEG", "MPO")
  limit = max_pixels if is_jpeg else max_pixels // 2
  check_size(image.width, image.height, key, limit)
  # `tile` is not public: (decoder, extents, offset, arguments) of each part.
  decoders = {tile[0] for tile in getattr(image, "tile", ())}
  slow = decoders & Image.DECODERS.keys()
  pixels = image.width * image.height
  if slow and pixels > MAX_SLOW_PIXELS:
    unit = f"pixels of an uncommon kind of {image.format}"
    raise _limit_error(key, pixels, unit, MAX_SLOW_PIXELS)
  if "ppm_plain" in slow and size > _MAX_TEXT * pixels + 4096:
    raise _limit_error(key, size, "bytes of text", _MAX_TEXT * pixels + 4096)


def _check_count(key: str, count: int, unit: str, limit: int) -> None:
  if count > limit:
    raise _limit_error(key, count, unit, limit)


def _limit_error(key: str, count: int, unit: str, limit: int) -> BadRecord:
  reason = f"the image has {count:,} {unit} or more; at most {limit:,}"
  return BadRecord(key, f"{reason} are decoded")


def _count_scans(data: bytes) -> int:
  """Counts the scans of a JPEG up to its end, without thumbnails."""
  scans, offset = 0, 2
  while match := _MARKER.search(data, offset):
    offset, marker = match.end(), data[match.end() - 1]
    if marker == _EOI or offset + 2 > len(data):
      break
    scans += marker == _SOS
    if scans > MAX_SCANS:
      break
    if marker >= 0xC0 and marker != 0xD8:  # Has a length.
      offset += int.from_bytes(data[offset : offset + 2], "big")
  return scans


def _count_chunks(data: bytes) -> int:
  count, offset = 0, 8
  while offset + 8 <= len(data) and count <= MAX_PARTS:
    (length,) = struct.unpack_from(">I", data, offset)
    offset += length + 12
    count += 1
  return count


def _count_blocks(data: bytes) -> int:
  """Counts extensions and their sub-blocks before a GIF's first image."""
  offset = 13
  if len(data) > offset and data[10] & 0x80:
    offset += 3 << ((data[10] & 7) + 1)
  count = 0
  while offset + 2 < len(data) and count <= MAX_PARTS and data[offset] != 0x2C:
    # Pillow skips bytes that don't start a block, one at a time.
    count += 1
    if data[offset] != 0x21:
      offset += 1
      continue
    offset += 2
    while offset < len(data) and data[offset] and count <= MAX_PARTS:
      offset += data[offset] + 1
      count += 1
    offset += 1
  return count


def _count_strips(data: bytes) -> int:
  """Largest count of an offset or size tag in a TIFF's first directory."""
  order = "<" if data[:2] == b"II" else ">"
  if len(data) < 16:
    return 0
  is_big = struct.unpack_from(order + "H", data, 2)[0] == 43
  offset, number, entry = ("Q", "Q", "HHQ8x") if is_big else ("I", "H", "HHI4x")
  number, entry = order + number, order + entry
  (at,) = struct.unpack_from(order + offset, data, 4 + 4 * is_big)
  if at + struct.calcsize(number) > len(data):
    return 0
  (count,) = struct.unpack_from(number, data, at)
  if count > MAX_PARTS:
    return count
  at += struct.calcsize(number)
  largest, size = 0, struct.calcsize(entry)
  for start in range(at, min(at + count * size, len(data) - size + 1), size):
    tag, _, values = struct.unpack_from(entry, data, start)
    if tag in _STRIP_TAGS:
      largest = max(largest, values)
  return largest
