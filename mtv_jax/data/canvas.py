"""Image decoding, and resizing to the square canvas.

The canvas is the whole image squashed to `S x S`, with its original size beside
it, so that image, depth and boxes share the coordinates of the unit square.

OpenCV decodes JPEGs of one or three components without holding the GIL. Pillow
decodes the rest, correctly also for CMYK, palettes, transparency and 16 bits.
On ordinary JPEGs both give the same pixels. For every format:

* EXIF rotation is applied, and the original size is the rotated one.
* Transparent pixels lie on white.
* 16-bit grey is scaled (65535 -> 255), not clipped. Float pixels, and integers
  beyond 16 bits, have no known white and are rejected.
* Of an animation, the first frame. Colour profiles are ignored.
"""

import io
import math
import struct
import zlib
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from mtv_jax.data.records import BadRecord

# 9000 x 8888, larger than the photos of web data sets and below the size at
# which Pillow warns. 240 MB as RGB, in every reader thread at once.
MAX_PIXELS = 80_000_000

# Others (PostScript, PSD, FITS, ...) start programs or are never photos.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Raised by Pillow's decoders on corrupt bytes (measured).
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError)
_DAMAGED += (OverflowError, struct.error, zlib.error)

# Markers of frames with Huffman coding: baseline, extended and progressive.
_FRAMES = (0xC0, 0xC1, 0xC2)


class _Jpeg(NamedTuple):
  height: int
  width: int
  components: int
  is_complete: bool  # It has an end-of-image marker after the first scan.


def decode(
  data: bytes, *, key: str = "image", max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes a file to RGB and applies its EXIF rotation.

  Args:
    data: a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file.
    key: key of the record, for errors.
    max_pixels: larger images are rejected before they are decoded.

  Raises:
    BadRecord: not an image, truncated, corrupt, too large, or of a kind whose
      white is unknown.
  """
  if not data:
    raise BadRecord(key, "the image has no bytes")
  header = _jpeg_header(data)
  if header is not None:
    _check_size(header.width, header.height, key, max_pixels)
    # OpenCV fills the missing part of a cut JPEG with grey; Pillow raises.
    if header.is_complete and header.components in (1, 3):
      image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
      if image is not None:
        return image
  return _decode_pillow(data, key, max_pixels)


def from_pillow(
  image: Image.Image, *, key: str = "image"
) -> UInt8[np.ndarray, "h w 3"]:
  """Converts a Pillow image to RGB by the rules of `decode`.

  Raises:
    BadRecord: an image of a kind whose white is unknown.
  """
  image.load()
  image = ImageOps.exif_transpose(image)
  if image.mode == "F":
    raise BadRecord(key, "the image has float pixels, of no known range")
  if image.mode.startswith("I"):
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
      span = f"from {grey.min()} to {grey.max()}, of no known range"
      raise BadRecord(key, f"the image has integers {span}; 16 bits at most")
    return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, -1)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image)
  return np.array(image.convert("RGB"))


def squash(
  image: UInt8[np.ndarray, "h w 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
  """Resizes the whole image to a square, antialiased.

  Where no dimension grows, each new pixel is the mean over its area. Else a
  dimension that shrinks is blurred first and both are interpolated linearly.
  """
  height, width = image.shape[:2]
  if (height, width) == (size, size):
    return image
  if min(height, width) >= size:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
  # OpenCV averages areas only if no dimension grows, and would alias here.
  if max(height, width) > size:
    image = _blur(image, size)
  return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def _blur(
  image: UInt8[np.ndarray, "h w 3"], size: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Antialiasing blur of the longer dimension before it shrinks to `size`.

  Shrinking by s, an antialiased linear filter is a triangle of variance s^2/6.
  Interpolation contributes 1/6; this Gaussian has the other (s^2 - 1)/6.
  """
  height, width = image.shape[:2]
  sigma = math.sqrt(((max(height, width) / size) ** 2 - 1) / 6)
  length = 2 * math.ceil(2.5 * sigma) + 1
  kernel = (length, 1) if width > height else (1, length)
  return cv2.GaussianBlur(image, kernel, sigma)


def _check_size(width: int, height: int, key: str, max_pixels: int) -> None:
  if width * height > max_pixels:
    raise BadRecord(
      key,
      f"the image is {width}x{height}, {width * height / 1e6:.0f} million"
      f" pixels; at most {max_pixels / 1e6:.0f} million are decoded",
    )


def _jpeg_header(data: bytes) -> _Jpeg | None:
  """Size and kind of a JPEG from its markers; None for all other bytes."""
  if data[:3] != b"\xff\xd8\xff":
    return None
  at, frame = 2, None
  while at + 4 <= len(data):
    if data[at] != 0xFF:
      return None
    marker = data[at + 1]
    if marker == 0xFF:  # padding before a marker
      at += 1
      continue
    (length,) = struct.unpack_from(">H", data, at + 2)
    if marker in _FRAMES and at + 10 <= len(data):
      bits, *frame = struct.unpack_from(">BHHB", data, at + 4)
      if bits != 8 or 0 in frame[:2]:
        return None
    if marker == 0xDA:  # the first scan: pixels follow
      if frame is None:
        return None
      # A thumbnail's end marker lies before the scan and is not counted.
      return _Jpeg(*frame, is_complete=data.rfind(b"\xff\xd9", at) > 0)
    at += 2 + length
  return None


def _decode_pillow(
  data: bytes, key: str, max_pixels: int
) -> UInt8[np.ndarray, "h w 3"]:
  try:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
      _check_size(image.width, image.height, key, max_pixels)
      return from_pillow(image, key=key)
  except BadRecord:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise BadRecord(key, f"the image is of absurd size ({e})") from e
  except Image.UnidentifiedImageError as e:
    start = f"{len(data)} bytes that start with {data[:8]!r}"
    formats = ", ".join(_FORMATS)
    raise BadRecord(key, f"{start} are no image; known: {formats}") from e
  except _DAMAGED as e:
    error = f"{type(e).__name__}: {e}"
    raise BadRecord(key, f"the image can't be decoded ({error})") from e
