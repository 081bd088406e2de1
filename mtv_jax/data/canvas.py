"""Image decoding, and resizing to the square canvas.

The canvas is the whole image squashed to `S x S`, stored with its original
size, so that image, depth and boxes share unit-square coordinates.

OpenCV decodes JPEGs with one or three components and releases the GIL; Pillow
decodes everything else. On ordinary JPEGs both return equal pixels. For every
format:

* EXIF rotation is applied; the original size is the rotated one.
* Transparent pixels are composited on white.
* 16-bit grey is scaled (65535 -> 255), not clipped. Float pixels and integers
  above 16 bits are rejected because their white level is unknown.
* Only the first frame of an animation is read. Colour profiles are ignored.

`decode` decodes at full resolution. `decode_to_canvas`, for training, decodes
JPEGs of at least twice the canvas at 1/2, 1/4 or 1/8 scale, from the low
frequencies of their DCT blocks.
"""

import io
import math
import struct
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from mtv_jax.data import image_limits
from mtv_jax.data.records import BadRecord, content_errors

# 9000 x 8888: above the photos of web data sets, below the size at which Pillow
# warns. 240 MB as RGB, in each reader thread.
MAX_PIXELS = 80_000_000

# File names of images, in folders and listings, in training and evaluation.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif")
IMAGE_SUFFIXES += (".tiff",)
# Images of cameras and phones that must be converted first.
UNSUPPORTED_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".dng", ".nef")
UNSUPPORTED_SUFFIXES += (".cr2",)
# Excludes formats that start programs or are never photos (PostScript, FITS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Side of the tiles that are converted to RGB.
_TILE = 1 << 11
# The blur's cost grows with the shrink factor. An image that shrinks by more,
# in one dimension only, is first area-averaged to this multiple of the canvas.
_MAX_SHRINK = 16

# OpenCV flags for reduced decoding, by divisor. Despite their names, they keep
# colours when combined with IMREAD_COLOR_RGB.
_REDUCED = {
  8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
  4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
  2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
}
_EXIF_ORIENTATION = 0x0112

# Start-of-frame markers with Huffman coding: baseline, extended, progressive.
_FRAME_MARKERS = (0xC0, 0xC1, 0xC2)


_RGB = UInt8[np.ndarray, "h w 3"]
_Canvas = UInt8[np.ndarray, "size size 3"]


class _Jpeg(NamedTuple):
  height: int
  width: int
  components: int
  is_complete: bool  # Has an end-of-image marker after the first scan.
  exif: bytes  # First EXIF segment.

  @property
  def can_use_opencv(self) -> bool:
    # OpenCV fills a truncated JPEG with grey; Pillow raises.
    return self.is_complete and self.components in (1, 3)


def decode(
  data: bytes, *, key: str = "image", max_pixels: int = MAX_PIXELS
) -> _RGB:
  """Decodes an image file to RGB and applies its EXIF rotation.

  Raises BadRecord if the file is not an image, is truncated or corrupt, would
  take long to decode (see `image_limits`), or has pixels with an unknown white
  level.
  """
  if not data:
    raise BadRecord(key, "the image has no bytes")
  with content_errors(key, "the image can't be decoded"):
    image_limits.check_file(data, key)
    return _decode(data, key, max_pixels)


def _decode(data: bytes, key: str, max_pixels: int) -> _RGB:
  header = _parse_jpeg_header(data)
  if header is not None:
    image_limits.check_size(header.width, header.height, key, max_pixels)
    if header.can_use_opencv:
      image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
      if image is not None:
        return image
  return _decode_pillow(data, key, max_pixels)


def decode_to_canvas(
  data: bytes, size: int, *, key: str = "image", max_pixels: int = MAX_PIXELS
) -> tuple[_Canvas, tuple[int, int]]:
  """Decodes a file and squashes it; large JPEGs are decoded at reduced scale.

  Returns the canvas and the original (height, width), after rotation. Raises
  BadRecord for the same reasons as `decode`.

  Other formats, and JPEGs of less than twice the canvas, yield exactly
  `squash(decode(data), size)`. At reduced scale, photos differ from that by 1
  to 3 of 255 on average and by up to 40 in one pixel in a thousand, with equal
  means: the DCT's low frequencies are sharper than area means.
  """
  with content_errors(key, "the image can't be decoded"):
    header = _parse_jpeg_header(data)
    if header is not None and header.can_use_opencv:
      divisor = choose_divisor(header.height, header.width, size)
      orientation = _read_orientation(header.exif) if divisor > 1 else None
      if orientation is not None:
        image_limits.check_file(data, key)
        image_limits.check_size(header.width, header.height, key, max_pixels)
        image = _decode_reduced(data, header, size, divisor)
        if image is not None:
          shape = header.height, header.width
          shape = shape[::-1] if orientation > 4 else shape
          return _rotate(image, orientation), shape
  image = decode(data, key=key, max_pixels=max_pixels)
  return squash(image, size), image.shape[:2]


def choose_divisor(height: int, width: int, size: int) -> int:
  """Largest JPEG divisor (8, 4, 2, 1) whose image still covers the canvas.

  Skips divisors for which OpenCV would copy and crop instead of resizing.
  """
  short_side = min(height, width)

  def is_copied(divisor):
    target_side = divisor * size
    # Sides of the reduced image, and the canvas sides as OpenCV rounds them.
    sides = [(-(-side // divisor), side) for side in (height, width)]
    is_same_size = all(round(n * target_side / side) == n for n, side in sides)
    return is_same_size and (height, width) != (target_side, target_side)

  fitting = (d for d in _REDUCED if short_side >= d * size and not is_copied(d))
  return next(fitting, 1)


def imread_flags(divisor: int) -> int:
  """OpenCV flags to decode a JPEG to RGB, reduced by `divisor`."""
  return cv2.IMREAD_COLOR_RGB | _REDUCED.get(divisor, 0)


def _decode_reduced(
  data: bytes, header: _Jpeg, size: int, divisor: int
) -> _Canvas | None:
  """Decodes to the canvas, before rotation; None if OpenCV can't decode it.

  The last row and column of the reduced image may extend past the image. The
  resize uses the scale of the image itself, so that nothing shifts.
  """
  flags = imread_flags(divisor) | cv2.IMREAD_IGNORE_ORIENTATION
  image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
  if image is None:
    return None
  # Given factors instead of a size, OpenCV rounds the size but not the scale.
  resized = cv2.resize(
    image,
    None,
    fx=size * divisor / header.width,
    fy=size * divisor / header.height,
    interpolation=cv2.INTER_AREA,
  )
  return resized[:size, :size]


def _read_orientation(exif: bytes) -> int | None:
  """EXIF orientation, 1 to 8; None if OpenCV and Pillow may disagree on it."""
  if not exif:
    return 1
  tiff = exif[6:]
  order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
  if order is None:
    return None
  try:
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    tags = [
      struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * i)
      for i in range(count)
    ]
  except struct.error:
    return None
  entries = [tag[1:] for tag in tags if tag[0] == _EXIF_ORIENTATION]
  match entries:
    case []:
      return 1
    case [(3, 1, value)] if 1 <= value <= 8:  # One SHORT.
      return value
  return None


def _rotate(image: _Canvas, orientation: int) -> _Canvas:
  if orientation > 4:
    image = image.swapaxes(0, 1)
  if orientation in (3, 4, 7, 8):
    image = image[::-1]
  if orientation in (2, 3, 6, 7):
    image = image[:, ::-1]
  return np.ascontiguousarray(image)


def from_pillow(image: Image.Image, *, key: str = "image") -> _RGB:
  """Converts a Pillow image to RGB, with the rules and errors of `decode`."""
  image.load()
  image = ImageOps.exif_transpose(image)
  if image.mode == "F":
    raise BadRecord(key, "the image has float pixels of unknown range")
  if image.mode.startswith("I"):
    low, high = image.getextrema()
    if low < 0 or high > 65535:
      span = f"from {low} to {high}, of unknown range"
      raise BadRecord(key, f"the image has integers {span}; expected 16 bits")
  width, height = image.size
  if max(width, height) <= _TILE:
    return _convert_to_rgb(image)
  # Convert by tiles: each step of the conversion copies its pixels.
  rgb = np.empty((height, width, 3), np.uint8)
  for y0 in range(0, height, _TILE):
    for x0 in range(0, width, _TILE):
      y1, x1 = min(y0 + _TILE, height), min(x0 + _TILE, width)
      rgb[y0:y1, x0:x1] = _convert_to_rgb(image.crop((x0, y0, x1, y1)))
  return rgb


def scale_16_bits(values: np.ndarray) -> np.ndarray:
  """Maps 0..65535 to uint8, rounded."""
  return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)


def _convert_to_rgb(image: Image.Image) -> _RGB:
  """Scales 16-bit grey; composites transparent pixels on white."""
  if image.mode.startswith("I"):
    return np.repeat(scale_16_bits(np.asarray(image))[..., None], 3, -1)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image)
  return np.array(image.convert("RGB"))


def squash(image: _RGB, size: int) -> _Canvas:
  """Resizes the whole image to a square, antialiased.

  If neither dimension grows, each pixel is the mean over its area. Otherwise a
  shrinking dimension is blurred first, then both are interpolated linearly.
  """
  height, width = image.shape[:2]
  if (height, width) == (size, size):
    return image
  if min(height, width) >= size:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
  # OpenCV's INTER_AREA averages only if no dimension grows, else it aliases.
  if max(height, width) > size:
    limit = _MAX_SHRINK * size
    if max(height, width) > limit:
      shape = min(width, limit), min(height, limit)
      image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
    image = _blur(image, size)
  return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def squash_bilinear(image: _RGB, size: int) -> _Canvas:
  """Resizes the whole image to a square by bilinear interpolation, aliased.

  A pixel is interpolated between four pixels, however much the image shrinks,
  and rounded down, as in big_vision's `resize(size)` (`tf.image.resize`).
  """

  def neighbours(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scale = np.float32(length) / np.float32(size)
    centre = (np.arange(size, dtype=np.float32) + 0.5) * scale - 0.5
    low = np.floor(centre)
    high = np.minimum(np.ceil(centre), length - 1)
    pair = np.maximum(low, 0).astype(int), high.astype(int)
    return *pair, (centre - low)[:, None]

  top, bottom, dy = neighbours(image.shape[0])
  left, right, dx = neighbours(image.shape[1])

  def read_rows(indices: np.ndarray) -> np.ndarray:
    rows = image[indices].astype(np.float32)  # [size, width, 3]
    return rows[:, left] + (rows[:, right] - rows[:, left]) * dx

  upper = read_rows(top)
  return (upper + (read_rows(bottom) - upper) * dy[:, None]).astype(np.uint8)


def _blur(image: _RGB, size: int) -> _RGB:
  """Antialiasing blur along the longer dimension, before it shrinks to `size`.

  For a shrink factor s, an antialiased linear filter is a triangle of variance
  s^2/6. Interpolation contributes 1/6; this Gaussian adds (s^2 - 1)/6.
  """
  height, width = image.shape[:2]
  sigma = math.sqrt(((max(height, width) / size) ** 2 - 1) / 6)
  length = 2 * math.ceil(2.5 * sigma) + 1
  kernel = (length, 1) if width > height else (1, length)
  return cv2.GaussianBlur(image, kernel, sigma)


def _parse_jpeg_header(data: bytes) -> _Jpeg | None:
  """Parses size and kind of a JPEG from its markers; None if not a JPEG."""
  if data[:3] != b"\xff\xd8\xff":
    return None
  offset, frame, exif = 2, None, b""
  while offset + 4 <= len(data):
    if data[offset] != 0xFF:
      return None
    marker = data[offset + 1]
    if marker == 0xFF:  # Padding before a marker.
      offset += 1
      continue
    (length,) = struct.unpack_from(">H", data, offset + 2)
    if marker in _FRAME_MARKERS and offset + 10 <= len(data):
      bits, *frame = struct.unpack_from(">BHHB", data, offset + 4)
      if bits != 8 or 0 in frame[:2]:
        return None
    if marker == 0xE1 and not exif and data[offset + 4 : offset + 8] == b"Exif":
      exif = data[offset + 4 : offset + 2 + length]
    if marker == 0xDA:  # The first scan: pixels follow.
      if frame is None:
        return None
      # A thumbnail's end marker precedes the scan and doesn't count.
      is_complete = data.rfind(b"\xff\xd9", offset) > 0
      return _Jpeg(*frame, is_complete=is_complete, exif=exif)
    offset += 2 + length
  return None


def _decode_pillow(data: bytes, key: str, max_pixels: int) -> _RGB:
  try:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
      image_limits.check_opened(image, len(data), key, max_pixels)
      return from_pillow(image, key=key)
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise BadRecord(key, f"the image is too large ({e})") from e
  except Image.UnidentifiedImageError as e:
    start = f"{len(data)} bytes that start with {data[:12]!r}"
    formats = ", ".join(_FORMATS)
    raise BadRecord(key, f"{start} are not an image; known: {formats}") from e
