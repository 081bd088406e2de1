"""Tar scans and index files."""

import io
import logging
import os
import tarfile
from concurrent import futures
from pathlib import Path

import pytest
from hostile.samples import write_tar

from mtv_jax.data.sources import tar_index, tar_scan
from mtv_jax.data.sources.tar_scan import IMAGE, JSON, TEXT, TarError
from mtv_jax.utils import atomic


def plain(count, prefix="", captions=True):
  members = []
  for i in range(count):
    members.append((f"{prefix}{i:04d}.jpg", b"image%d" % i * (i + 1)))
    if captions:
      members.append((f"{prefix}{i:04d}.txt", b"caption %d" % i))
  return members


def contents(path, spans):
  with path.open("rb") as file:
    result = []
    for span in spans:
      file.seek(span.offset)
      result.append(file.read(span.size) if span.offset else None)
  return result


def spans_by_key(scan):
  return {record.key: record.spans for record in scan.records}


@pytest.mark.parametrize(
  "format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]
)
def test_scan_agrees_with_tarfile(tmp_path, format):
  long = "a/" * 60 + "x" * (90 if format == tarfile.USTAR_FORMAT else 140)
  members = [
    ("one.jpg", b"1" * 700),
    ("one.json", b"{}"),
    ("sub/dir/two.PNG", b"2" * 512),
    ("sub/dir/two.txt", b"t"),
    (long + ".jpeg", b"3" * 513),
    (long + ".txt", b"long"),
    ("./dot.webp", b"4"),
    ("./dot.txt", b"5"),
  ]
  if format != tarfile.USTAR_FORMAT:
    members += [("schön/ü.jpg", b"6"), ("schön/ü.txt", b"7")]
  path = write_tar(tmp_path / "a.tar", members, format)
  expected = {}
  with tarfile.open(path) as tar:
    for member in tar:
      stem, extension = member.name.removeprefix("./").rsplit(".", 1)
      role = {"txt": TEXT, "json": JSON}.get(extension, IMAGE)
      spans = expected.setdefault(stem, [tar_scan.Span(0, 0)] * 3)
      spans[role] = tar_scan.Span(member.offset_data, member.size)
  result = tar_scan.scan(path)
  assert spans_by_key(result) == expected
  assert [group.key for group in result.groups] == list(expected)
  assert all(group.is_captioned for group in result.groups)
  assert not result.others


def test_key_ends_at_the_first_dot_of_the_base_name(tmp_path):
  path = write_tar(
    tmp_path / "a.tar",
    [
      ("v1.2/0001.jpg", b"i"),
      ("v1.2/0001.txt", b"t"),
      ("v1.2/0001.seg.png", b"a mask, not the image"),
      ("v1.2/._0001.jpg", b"of a Mac's archiver"),
      ("README", b"no extension"),
    ],
  )
  result = tar_scan.scan(path)
  (record,) = result.groups
  assert record.key == "v1.2/0001"
  assert contents(path, record.spans) == [b"i", b"t", None]
  assert result.others == 3


def test_members_of_a_record_need_not_be_neighbours(tmp_path):
  # `tar cf x.tar FOLDER` takes files in the order of the directory.
  members = plain(5)[::2] + plain(5)[1::2]
  path = write_tar(tmp_path / "a.tar", members)
  result = tar_scan.scan(path)
  assert [contents(path, r.spans)[TEXT] for r in result.records] == [
    b"caption %d" % i for i in range(5)
  ]


def test_folders_and_links_are_not_records(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    folder = tarfile.TarInfo("d.jpg")
    folder.type = tarfile.DIRTYPE
    tar.addfile(folder)
    link = tarfile.TarInfo("d/l.jpg")
    link.type = tarfile.SYMTYPE
    link.linkname = "x" * 150  # a GNU long link, which precedes the member
    tar.addfile(link)
    info = tarfile.TarInfo("d/l.txt")
    info.size = 2
    tar.addfile(info, io.BytesIO(b"no"))
  result = tar_scan.scan(tmp_path / "a.tar")
  assert not result.records
  assert [group.key for group in result.groups] == ["d/l"]


@pytest.mark.parametrize("what", ["data", "header", "padding", "boundary"])
def test_truncated(tmp_path, what, caplog):
  path = write_tar(tmp_path / "cut.tar", plain(4))
  spans = tar_scan.scan(path).records[2].spans
  at = {
    "data": spans[IMAGE].offset + 3,
    "header": spans[TEXT].offset - 100,
    "padding": spans[TEXT].offset + spans[TEXT].size + 10,
    "boundary": spans[TEXT].offset + 512,
  }[what]
  os.truncate(path, at)
  if what in ("data", "header"):
    with pytest.raises(TarError, match=r"cut\.tar is truncated.*offset \d+"):
      tar_scan.scan(path)
  else:
    # All members are complete, but the end mark is truncated.
    assert len(tar_scan.scan(path).records) == 3
    assert "no end mark" in caplog.text


def test_index_equals_the_scan(tmp_path):
  members = plain(7)
  del members[6]  # the image of 3
  del members[3]  # the text of 1
  path = write_tar(tmp_path / "a.tar", members)
  (index,) = tar_index.build_indices([path])
  assert index.file == tmp_path / "a.tar.index"
  header = index.header
  assert (header.count, header.captioned, header.no_image) == (6, 5, 1)
  assert (index.smallest, index.largest) == ("0000", "0006")
  # Records without captions come last; otherwise the order is the tar's.
  assert index.read_keys() == ["0000", "0002", "0004", "0005", "0006", "0001"]
  entries, keys = index.open()
  assert not entries.flags.writeable
  assert bytes(keys) == "".join(index.read_keys()).encode()
  scanned = spans_by_key(tar_scan.scan(path))
  for entry, key in zip(entries, index.read_keys(), strict=True):
    image, text, sidecar = scanned[key]
    assert (entry["image"], entry["image_size"]) == image
    assert (entry["text"], entry["text_size"]) == text
    assert (entry["json"], entry["json_size"]) == sidecar
  assert index.file.stat().st_mode & 0o777 == 0o644


def test_skipped_groups_are_logged_with_their_number(tmp_path, caplog):
  members = plain(3) + [("bare.jpg", b"i"), ("lost.txt", b"t")]
  path = write_tar(tmp_path / "a.tar", members)
  tar_index.build_indices([path])
  assert "1 records have no image: lost" in caplog.text
  assert "1 records have neither .txt nor .json: bare" in caplog.text


def test_valid_index_is_not_rebuilt(tmp_path, monkeypatch):
  path = write_tar(tmp_path / "a.tar", plain(3))
  before = tar_index.build_indices([path])
  monkeypatch.setattr(tar_scan, "scan", None)
  assert tar_index.build_indices([path]) == before


def test_temporary_indices_leave_no_file(tmp_path, monkeypatch, caplog):
  """Beside the tars, where a dry run must not write."""
  paths = [write_tar(tmp_path / f"{i}.tar", plain(3)) for i in range(2)]
  (first,) = tar_index.build_indices(paths[:1])
  with tar_index.temporary_indices():
    indices = tar_index.build_indices(paths)
    assert indices[0] == first and indices[1].read_keys() == first.read_keys()
    monkeypatch.setattr(tar_scan, "scan", None)
    assert tar_index.build_indices(paths) == indices
  names = {file.name for file in tmp_path.iterdir()}
  assert names == {"0.tar", "0.tar.index", "1.tar"}
  assert not indices[1].file.exists()
  assert "Indexed 1 of 2 tars." in caplog.text
  assert caplog.messages[-1].endswith("the run builds these again.")


@pytest.mark.parametrize(
  ("change", "count", "message"),
  [
    (lambda tar, index: write_tar(tar, plain(5)), 5, "the tar has"),
    (lambda tar, index: os.utime(tar, ns=(0, 1)), 300, "was modified at"),
    (lambda tar, index: os.truncate(index, 9000), 300, "truncated"),
    (lambda tar, index: index.write_bytes(b"x" * 230), 300, "of this version"),
  ],
)
def test_stale_index_is_rebuilt(tmp_path, caplog, change, count, message):
  path = write_tar(tmp_path / "a.tar", plain(300))
  (old,) = tar_index.build_indices([path])
  change(path, old.file)
  (new,) = tar_index.build_indices([path])
  assert message in caplog.text and str(old.file) in caplog.text
  assert new.header.count == count
  # The new index is also written.
  caplog.clear()
  assert tar_index.build_indices([path]) == [new]
  assert not caplog.text


def _full(*args, **kwargs):
  raise OSError(30, "Read-only file system")


def test_stale_index_that_cannot_be_written_raises(tmp_path, monkeypatch):
  path = write_tar(tmp_path / "a.tar", plain(3))
  tar_index.build_indices([path])
  write_tar(path, plain(5))
  monkeypatch.setattr(Path, "write_bytes", _full)
  with pytest.raises(OSError, match="index_dir") as error:
    tar_index.build_indices([path])
  for part in (path, f"{path}.index", "the tar has", "Read-only"):
    assert str(part) in str(error.value)
  monkeypatch.undo()
  (index,) = tar_index.build_indices([path], index_dir=tmp_path / "new" / "dir")
  assert index.header.count == 5


def test_index_dir_tells_tars_of_one_name_apart(tmp_path):
  for i, folder in enumerate(("a", "b")):
    (tmp_path / folder).mkdir()
    write_tar(tmp_path / folder / "00000.tar", plain(i + 2))
  tars = [tmp_path / "a" / "00000.tar", tmp_path / "b" / "00000.tar"]
  indices = tar_index.build_indices(tars, index_dir=tmp_path / "i")
  assert [index.header.count for index in indices] == [2, 3]
  assert len(list((tmp_path / "i").iterdir())) == 2
  assert not list(tmp_path.glob("[ab]/*.index"))


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
  path = write_tar(tmp_path / "a.tar", plain(3))
  monkeypatch.setattr(tar_index.os, "replace", _full)
  with pytest.raises(OSError, match="can't be written"):
    tar_index.build_indices([path])
  assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_temporary_files_of_killed_builds_are_removed(tmp_path):
  tar = write_tar(tmp_path / "a.tar", plain(3))
  mine = atomic.current_process()
  killed = atomic.Owner(mine.machine, mine.pid, "00000000")
  abandoned = tmp_path / f".a.tar.index.{killed}.0.tmp"
  abandoned.touch()
  tar_index.build_indices([tar])
  assert not abandoned.exists()


def test_concurrent_builds(tmp_path):
  tars = [write_tar(tmp_path / f"{i}.tar", plain(20)) for i in range(6)]
  with futures.ThreadPoolExecutor(8) as pool:
    results = list(pool.map(tar_index.build_indices, [tars] * 8))
  assert all(result == results[0] for result in results)
  assert len(list(tmp_path.iterdir())) == 12


def test_worker_processes_build_indices(tmp_path, monkeypatch):
  monkeypatch.setattr(tar_index, "_MIN_TARS", 4)
  monkeypatch.setattr(tar_index, "available_cores", lambda: 2)
  folder = tmp_path / "tars"
  folder.mkdir()
  tars = [write_tar(folder / f"{i}.tar", plain(20, f"{i}")) for i in range(8)]
  os.truncate(tars[5], 1100)
  started = []
  popen = tar_index.subprocess.Popen

  def start(*args, **kwargs):
    started.append(popen(*args, **kwargs))
    return started[-1]

  def only_look(*args):
    started[0].wait()  # so that the helper has done all of it
    monkeypatch.setattr(tar_scan, "scan", reject)
    return build(*args)

  def reject(tar):
    raise TarError(f"this process had to scan {tar.name}")

  build = tar_index._build
  monkeypatch.setattr(tar_index.subprocess, "Popen", start)
  monkeypatch.setattr(tar_index, "_build", only_look)
  # The helper left only the bad one, and errors are this process's to report.
  with pytest.raises(TarError, match=r"^this process had to scan 5\.tar$"):
    tar_index.build_indices(tars, index_dir=tmp_path / "index")
  assert len(started) == 1 and started[0].returncode == 0
  assert len(list((tmp_path / "index").iterdir())) == 7


def test_empty_tar_has_an_empty_index(tmp_path):
  path = write_tar(tmp_path / "a.tar", [])
  (index,) = tar_index.build_indices([path])
  entries, keys = index.open()
  assert entries.shape == (0,) and keys.shape == (0,)
  assert index.read_keys() == []


@pytest.fixture(autouse=True)
def _log_everything(caplog):
  caplog.set_level(logging.INFO)


def test_offsets_beyond_four_gigabytes(tmp_path):
  """A size of over 8 GiB is binary in the header (GNU)."""
  # A sparse file, which takes no disk space.
  path = tmp_path / "a.tar"
  large = tarfile.TarInfo("video.mp4")
  large.size = 9 << 30
  with path.open("wb") as file:
    header = large.tobuf(tarfile.GNU_FORMAT)
    assert header[124] == 0x80
    file.write(header)
    file.seek(large.size, os.SEEK_CUR)
    file.write(write_tar(tmp_path / "small.tar", plain(2)).read_bytes())
  (index,) = tar_index.build_indices([path])
  assert index.header.others == 1
  entries, _ = index.open()
  assert int(entries["image"][0]) == 512 + large.size + 512
  with path.open("rb") as file:
    file.seek(int(entries["text"][1]))
    assert file.read(int(entries["text_size"][1])) == b"caption 1"
