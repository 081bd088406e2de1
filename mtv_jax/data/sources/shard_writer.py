"""Shard writer: WebDataset tars in img2dataset's layout, or ArrayRecord.

For each record, `00000.tar` has `000000000.jpg`, `000000000.json` and
`000000000.txt`. The key combines shard and row number, so an unusable row
leaves a gap. The JSON field `captions` has all captions, the .txt only the
first. For ArrayRecord, the JSON of all records is in `00000_meta.jsonl`.
`00000_stats.json` has counts, `blocks.npz` the table of the shards' blocks.
Equal input gives equal bytes.
"""

import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2

from mtv_jax.config.options import PositiveInt, check_value
from mtv_jax.data import canvas, image_limits
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources import array_record, block_table, indexing
from mtv_jax.data.sources.base import LANE_BLOCK, Source
from mtv_jax.data.sources.listings import Example
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError, check_choice, printable
from mtv_jax.utils.path import read_regular, refuse_remote
from mtv_jax.utils.threads import map_ahead

# Images decoded in advance; also images between two progress reports.
_AHEAD = 64
_QUALITY = 95
_SUFFIXES = {"webdataset": ".tar", "array_record": ".array_record"}


@dataclasses.dataclass
class ShardReport:
  """Progress of `write`."""

  total: int  # Listed examples.
  done: int = 0  # Examples written or skipped.
  # Unusable examples; their `problem` is the reason.
  skipped: list[Example] = dataclasses.field(default_factory=list)
  shards: list[Path] = dataclasses.field(default_factory=list)  # Finished.

  @property
  def written(self) -> int:
    return self.done - len(self.skipped)


class SourceExamples(Sequence[Example]):
  """Records of a source as examples, each read when it is encoded."""

  def __init__(self, source: Source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: Any) -> Any:
    if isinstance(i, slice):
      return [self[k] for k in range(*i.indices(len(self)))]
    name = self._source.name
    read = functools.partial(self._source.__getitem__, i)
    return Example(f"{name}/{i}", Path(name), [], read=read)


@dataclasses.dataclass(frozen=True)
class _Encoding:
  image: bytes
  extension: str
  captions: list[str]
  meta: dict[str, Any]


def write(
  examples: Sequence[Example],
  out: str | os.PathLike,
  *,
  format: str = "webdataset",
  records_per_shard: int = 10_000,
  max_side: int | None = None,
  progress: Callable[[ShardReport], None] = lambda report: None,
) -> ShardReport:
  """Writes all usable examples; each shard appears when it is complete.

  Every image is decoded once to detect corruption. Its bytes are copied, unless
  its longer side exceeds `max_side` (then JPEG of quality 95) or the format is
  not JPEG, PNG or WebP (then PNG). A shard covers `records_per_shard` listed
  rows, including skipped ones. `out` must not contain shards yet. Skipped
  examples are listed in `out/skipped.jsonl` and the report. Raises InputError
  if no example is usable, and removes the empty shards.
  """
  check_choice("format", format, _SUFFIXES)
  suffix = _SUFFIXES[format]
  sizes = {"records_per_shard": records_per_shard, "max_side": max_side}
  for name, size in sizes.items():
    check_value(size, PositiveInt | None, name)
  out = _open_folder(out, suffix)
  report = ShardReport(total=len(examples))
  scan, per_block = indexing.choose_scan(format, LANE_BLOCK)
  digits, tables = len(str(records_per_shard - 1)), []
  for shard, start in enumerate(range(0, len(examples), records_per_shard)):
    rows = examples[start : start + records_per_shard]
    skipped = len(report.skipped)
    records = (
      (f"{shard:05d}{row:0{digits}d}", record)
      for row, record in _encode_rows(rows, max_side, report, progress)
    )
    path = out / f"{shard:05d}{suffix}"
    write_shard = _write_tar if suffix == ".tar" else _write_array_record
    write_shard(path, records)
    stats = _format_stats(len(rows), report.skipped[skipped:])
    atomic.write(out / f"{shard:05d}_stats.json", stats.encode())
    # A copy in a bucket has a different version, so versions aren't compared.
    state = path.stat().st_size, ""
    table = block_table.of_file(path, state, scan(path), per_block=per_block)
    tables.append(table)
    report.shards.append(path)
    progress(report)
  if tables:
    block_table.join(tables).write(out / block_table.NAME)
  listing = out / "skipped.jsonl"
  listing.unlink(missing_ok=True)
  entries = [
    {"name": printable(e.name), "reason": e.problem} for e in report.skipped
  ]
  if lines := [json.dumps(e, ensure_ascii=False) + "\n" for e in entries]:
    atomic.write(listing, "".join(lines).encode())
  if not report.written:
    _remove_shards(out, report.shards)
    reasons = Counter(e.problem for e in report.skipped).most_common(3)
    counts = "; ".join(f"{n} times {reason!r}" for reason, n in reasons)
    raise InputError(
      f"None of the {report.total} examples can be used: {counts}. The first is"
      f" at {printable(examples[0].path)}. See {listing}."
    )
  return report


def _remove_shards(out: Path, shards: Sequence[Path]) -> None:
  for path in shards:
    for suffix in (path.suffix, "_stats.json", "_meta.jsonl"):
      path.with_name(path.stem + suffix).unlink(missing_ok=True)
  (out / block_table.NAME).unlink(missing_ok=True)


def _open_folder(out: str | os.PathLike, suffix: str) -> Path:
  """Creates the folder; FileExistsError if it has shards."""
  refuse_remote(out, "The output", "Write to a folder, and copy it.")
  out = Path(out).expanduser()
  if out.exists() and not out.is_dir():
    raise NotADirectoryError(f"{out} is a file; pass a folder for the shards.")
  out.mkdir(parents=True, exist_ok=True)
  if existing := sorted(p.name for p in out.iterdir() if p.suffix == suffix):
    raise FileExistsError(
      f"{out} already contains {len(existing)} shards ({existing[0]}, ...):"
      " remove them, or choose another folder."
    )
  return out


def _encode_rows(
  rows: Sequence[Example],
  max_side: int | None,
  report: ShardReport,
  progress: Callable[[ShardReport], None],
) -> Iterator[tuple[int, _Encoding]]:
  """Yields usable rows of a shard with row numbers; reports unusable ones."""
  encode = functools.partial(_encode_example, max_side=max_side)
  for row, result in enumerate(map_ahead(encode, rows, ahead=_AHEAD)):
    report.done += 1
    if isinstance(result, str):
      report.skipped.append(dataclasses.replace(rows[row], problem=result))
    else:
      yield row, result
    if report.done % _AHEAD == 0:
      progress(report)
  progress(report)


def _encode_example(example: Example, max_side: int | None) -> _Encoding | str:
  """Returns the encoded example, or the reason why it is unusable."""
  if example.problem:
    return example.problem
  try:
    if example.read:
      record = example.read()
      data = record["image"]
      if not isinstance(data, bytes):  # Rendered pixels.
        data = _encode_image(data, ".png", [])
      example = Example(record["key"], example.path, record.get("captions", []))
      if example.problem:
        return example.problem
    else:
      data = read_regular(example.path, limit=image_limits.MAX_BYTES)
    image = canvas.decode(data, key=example.name)
  except BadRecord as error:
    return error.reason
  except OSError as error:
    return error.strerror or str(error)
  except ValueError as error:  # Not a regular file, or an invalid name.
    return printable(error)
  height, width = image.shape[:2]
  original = {"original_width": width, "original_height": height}
  original["sha256"] = hashlib.sha256(data).hexdigest()
  extension = _find_extension(data)
  if max_side is not None and max(height, width) > max_side:
    scale = max_side / max(height, width)
    width, height = (max(1, round(n * scale)) for n in (width, height))
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    extension = "jpg"
    data = _encode_image(image, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
  elif extension is None:
    extension, data = "png", _encode_image(image, ".png", [])
  meta = {"width": width, "height": height} | original | example.extra
  meta["url"] = example.name
  return _Encoding(data, extension, example.captions, meta)


def _find_extension(data: bytes) -> str | None:
  """Extension from the content, since file names may be wrong."""
  if data.startswith(b"\xff\xd8\xff"):
    return "jpg"
  if data.startswith(b"\x89PNG\r\n\x1a\n"):
    return "png"
  return "webp" if data[8:12] == b"WEBP" else None


def _encode_image(image: Any, extension: str, options: list[int]) -> bytes:
  image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
  return cv2.imencode(extension, image, options)[1].tobytes()


def _write_array_record(
  path: Path, records: Iterator[tuple[str, _Encoding]]
) -> None:
  lines = []

  def make_records() -> Iterator[dict[str, Any]]:
    for key, record in records:
      meta = json.dumps({"key": key} | record.meta, ensure_ascii=False)
      lines.append(meta + "\n")
      yield {"key": key, "image": record.image, "captions": record.captions}

  array_record.write(path, make_records())
  sidecar = path.with_name(path.stem + "_meta.jsonl")
  atomic.write(sidecar, "".join(lines).encode())


def _write_tar(path: Path, records: Iterator[tuple[str, _Encoding]]) -> None:
  """Writes members in img2dataset's order: image, .json, .txt."""
  with (
    atomic.replace_file(path) as temporary,
    tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
  ):
    for key, record in records:
      meta = {
        "caption": record.captions[0],
        "captions": record.captions,
        "key": key,
        "status": "success",
        "error_message": None,
      } | record.meta
      text = json.dumps(meta, ensure_ascii=False, indent=1)
      _add_member(tar, f"{key}.{record.extension}", record.image)
      _add_member(tar, f"{key}.json", text.encode())
      _add_member(tar, f"{key}.txt", record.captions[0].encode())


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
  # TarInfo's defaults (time 0, owner 0) make equal input equal bytes.
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


def _format_stats(count: int, skipped: Sequence[Example]) -> str:
  status_counts = Counter(example.problem for example in skipped)
  missing = status_counts[os.strerror(errno.ENOENT)]
  if successes := count - len(skipped):
    status_counts["success"] = successes
  stats = {
    "count": count,
    "successes": successes,
    "failed_to_download": missing,
    "failed_to_resize": len(skipped) - missing,
    "status_dict": dict(sorted((+status_counts).items())),
  }
  return json.dumps(stats, ensure_ascii=False, indent=1) + "\n"
