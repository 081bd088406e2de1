"""Files in buckets, in emulators of both stores."""

import logging
import os
import shutil

import numpy as np
import pytest

from mtv_jax.utils import atomic, buckets, path
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  StorageError,
  UserError,
)
from mtv_jax.utils.path_patterns import expand_path
from mtv_jax.utils.threads import map_threads


def test_a_failed_request_is_repeated_and_names_the_file(monkeypatch, caplog):
  waits, calls = [], []
  monkeypatch.setattr(buckets.time, "sleep", waits.append)

  def fail(*args):
    calls.append(args)
    raise ConnectionError("reset by peer")

  with pytest.raises(
    StorageError, match=r"gs://b/1\.tar can't be read: .*reset"
  ):
    buckets.retry("gs://b/1.tar", "read", fail, 7)
  assert calls == [(7,)] * 5
  assert all(a < b for a, b in zip(waits, waits[1:], strict=False)), waits

  def recover(*args):
    return "data" if len(calls) > 6 else fail(*args)

  with caplog.at_level(logging.WARNING):
    assert buckets.retry("gs://b/1.tar", "read", recover, 7) == "data"
  assert "gs://b/1.tar can't be read" in caplog.text


def test_a_bucket_that_does_not_answer_is_tried_on(monkeypatch, caplog):
  times = [0.0]
  monkeypatch.setattr(buckets.time, "monotonic", lambda: times[-1])
  monkeypatch.setattr(
    buckets.time, "sleep", lambda wait: times.append(times[-1] + wait)
  )

  def read():
    if times[-1] < answers:
      raise ConnectionError("reset by peer")
    return "data"

  answers = 200
  assert buckets.retry("gs://b/1.tar", "read", read, patience=240.0) == "data"
  waits = np.diff(times)
  assert 10 < max(waits) <= 60
  assert caplog.text.count("gs://b/1.tar can't be read") == len(waits)
  answers = 500
  with pytest.raises(StorageError, match="reset by peer"):
    buckets.retry("gs://b/1.tar", "read", read, patience=240.0)
  assert 440 <= times[-1] < 500


def test_a_bucket_that_never_answers_is_soon_given_up(monkeypatch):
  """A request takes half a minute without a network: gcsfs repeats it."""
  times, calls = [0.0], []
  monkeypatch.setattr(buckets.time, "monotonic", lambda: times[-1])
  monkeypatch.setattr(buckets.time, "sleep", lambda wait: None)
  monkeypatch.setattr(buckets, "_answering", set())

  error = ConnectionError("Name or service not known")

  def fail():
    times.append(times[-1] + 33.0)
    calls.append(buckets.progress._jobs[-1][0]())
    raise error

  def attempts():
    calls.clear()
    with pytest.raises(StorageError, match="not known"):
      buckets.retry("gs://nope/1.tar", "read", fail)
    return calls

  assert attempts() == ["waiting for gs://nope"]
  buckets.retry("gs://nope/2.tar", "read", lambda: "data")
  with buckets.progress.activity("step 3"):
    assert attempts() == ["step 3"] * 5
    buckets._answering.clear()
    error.status = 503  # An answer.
    assert attempts() == ["waiting for gs://nope"] + ["step 3"] * 4


def test_gcsfs_logs_no_traceback(caplog):
  buckets.configure()
  try:
    raise ConnectionError("reset by peer")
  except ConnectionError:
    logging.getLogger("gcsfs").exception("out of retries")
  assert "out of retries" in caplog.text and "Traceback" not in caplog.text


@pytest.mark.slow
def test_tensorstore_soon_gives_up(monkeypatch):
  """It logs no repetition; by default, it goes on for a quarter of an hour."""
  names = "ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"
  values = "http://localhost:9", "test", "test", "us-east-1"
  for name, value in zip(names, values, strict=True):
    monkeypatch.setenv(f"AWS_{name}", value)
  store, key = buckets.open_store("s3://unreachable/1.tar")
  with pytest.raises(ValueError, match="All 3 retry attempts failed"):
    store.read(key).result(timeout=60)


def test_what_is_not_allowed_is_not_repeated(monkeypatch):
  monkeypatch.setattr(buckets.time, "sleep", lambda _: pytest.fail("waited"))

  def forbid():
    raise OSError("Forbidden: https://storage.googleapis.com/b/1.tar")

  with pytest.raises(StorageError, match="Forbidden"):
    buckets.retry("gs://b/1.tar", "read", forbid)
  with pytest.raises(MissingFileError, match=r"There is no gs://b/1\.tar"):
    buckets.retry("gs://b/1.tar", "read", open, "/nonexistent")


class _HostileStore:
  """A store whose listing has any names; its objects have two bytes."""

  def __init__(self, *names):
    self._names = [f"b/m/{name}".rstrip("/") for name in names]
    self.etag, self.next_etag = "1", "1"

  def find(self, url, *, detail):
    return {name: {"size": 2, "etag": self.etag} for name in self._names}

  def get_file(self, url, file):
    self.etag = self.next_etag
    with open(file, "wb") as stream:
      stream.write(b"ok")


@pytest.mark.parametrize(
  "name", ["../evil.txt", "sub/../../evil.txt", "sub/..", "nul\0.txt"]
)
def test_names_that_leave_the_folder_are_not_copied(
  name, tmp_path, monkeypatch
):
  store = _HostileStore("good.txt", "sub/also.txt", name)
  monkeypatch.setattr(buckets, "get_store", lambda path: store)
  cache = tmp_path / "a" / "b" / "cache"
  local = tmp_path / "a" / "b" / "local"
  refused = pytest.raises(InputError, match=r"gs://b/m.* has an object named")
  with refused:
    path.local_copy("gs://b/m", cache=cache)
  with refused:
    path.download_folder("gs://b/m", local)
  with refused:
    path.local_copy("gs://b/m/..", cache=cache)
  # Not even the good ones: names are checked before the first copy.
  files = [f for f in tmp_path.rglob("*") if f.is_file()]
  assert not [f for f in files if f.suffix != ".lock"], files
  store = _HostileStore("good.txt", "sub/..also.txt")
  copy = path.local_copy("gs://b/m", cache=cache)
  assert (copy / "sub" / "..also.txt").read_bytes() == b"ok"
  path.download_folder("gs://b/m", local, ignore=["good*"])
  assert [f.name for f in local.rglob("*") if f.is_file()] == ["..also.txt"]


def test_an_object_replaced_while_it_is_copied_is_named(tmp_path, monkeypatch):
  store = _HostileStore("a")
  store.next_etag = "2"
  monkeypatch.setattr(buckets, "get_store", lambda path: store)
  with pytest.raises(InputError, match="gs://b/m was replaced while"):
    path.local_copy("gs://b/m", cache=tmp_path)
  assert path.local_copy("gs://b/m", cache=tmp_path).is_dir()


def test_copies_need_space(tmp_path, monkeypatch, caplog):
  store = _HostileStore("a", "b", "c")
  monkeypatch.setattr(buckets, "get_store", lambda path: store)
  usage = shutil.disk_usage(tmp_path)
  full = lambda folder: usage._replace(free=5)  # noqa: E731
  monkeypatch.setattr(shutil, "disk_usage", full)
  urls = ["gs://b/m", "gs://b/n"]
  with pytest.raises(InputError, match="m takes 6 B; .* only 5 B"):
    path.local_copy(urls[0], cache=tmp_path)
  assert not any(tmp_path.iterdir())
  monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
  path.local_copy(urls[0], cache=tmp_path)
  # What is there already takes no more space.
  monkeypatch.setattr(shutil, "disk_usage", full)
  path.local_copy(urls[0], cache=tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
  monkeypatch.setattr(path, "_LOGGED_BYTES", 5)
  monkeypatch.setattr(path, "_WARNED_BYTES", 5)
  dead = atomic.current_process()._replace(token="00000000")
  killed = tmp_path / f".n.{dead}.0.tmp"
  killed.mkdir()
  assert (path.local_copy(urls[1], cache=tmp_path) / "c").is_file()
  assert not killed.exists()
  assert "Copying gs://b/n (6 B) to" in caplog.text


def test_lazy_copies(tmp_path, monkeypatch):
  store = _HostileStore("sub/a.jpg", "b.txt", "c.jpg")
  monkeypatch.setattr(buckets, "get_store", lambda path: store)
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path))

  def copy_lazily():
    return path.lazy_copy("gs://b/m", lambda n: n.endswith(".jpg"), share=0.5)

  usage = shutil.disk_usage(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=3))
    match = r"needed part of gs://b/m \(6 B in all\) takes 4 B; .* only 3 B"
    with pytest.raises(InputError, match=match):
      copy_lazily()
  folder = copy_lazily()
  image = folder / "sub/a.jpg"
  assert (folder / "b.txt").read_bytes() == b"ok"
  assert image.stat().st_size == 2
  assert str(path.origin(image)) == "gs://b/m/sub/a.jpg"
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1))
    with pytest.raises(InputError, match=r"sub/a\.jpg takes 2 B; .* only 1 B"):
      path.fetch(image)
  assert path.fetch(image).read_bytes() == b"ok"
  assert path.origin(image) == image == copy_lazily() / "sub/a.jpg"
  # Other local files may be from 1970.
  local = tmp_path / "local"
  local.touch()
  os.utime(local, (0, 0))
  assert path.fetch(local) == local


@pytest.mark.slow
def test_an_emulated_store_can_not_write_outside_the_cache(s3, tmp_path):
  # The emulator of Google's store can't hold such a name.
  import fsspec

  store, name = fsspec.filesystem("s3"), s3.partition("://")[2]
  store.pipe_file(f"{name}/evil/m/../../../../../evil.txt", b"x")
  store.pipe_file(f"{name}/evil/m/good.txt", b"x")
  cache = tmp_path / "a" / "b" / "c" / "d"
  with pytest.raises(InputError, match=r"evil/m has an object named"):
    path.local_copy(f"{s3}/evil/m", cache=cache)
  assert not [*tmp_path.rglob("evil.txt")]


@pytest.mark.slow
def test_files(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "cache"))
  folder = path.as_path(f"{bucket}/files")
  file = folder / "a.bin"
  data = bytes(range(256)) * 40
  path.write_bytes(file, data)
  assert str(file) == f"{bucket}/files/a.bin"
  assert path.exists(file) and path.is_file(file) and path.is_folder(folder)
  assert not path.is_file(folder) and not path.exists(folder / "b.bin")
  assert path.stat(file).st_size == len(data)
  assert path.read_bytes(file) == data
  assert path.read_range(file, 300, 20) == data[300:320]
  with path.open_file(file) as opened:
    assert opened.seek(0, 2) == len(data)
    opened.seek(1000)
    assert opened.read(24) == data[1000:1024]
    assert opened.read() == data[1024:] and opened.read() == b""
  assert path.list_folder(folder) == ["a.bin"]
  copy = path.local_copy(file)
  assert copy.read_bytes() == data and path.local_copy(file) == copy
  path.write_bytes(file, b"new")
  assert path.local_copy(file).read_bytes() == b"new"
  path.remove(file)
  with pytest.raises(MissingFileError, match=r"files/a\.bin"):
    path.read_bytes(file)
  with pytest.raises(MissingFileError, match="nothing at"):
    path.local_copy(folder)


@pytest.mark.slow
def test_folders_are_copied_whole_by_one_of_many(bucket, tmp_path):
  local = tmp_path / "made"
  (local / "sub").mkdir(parents=True)
  for name in ("config.json", "weights", "sub/x"):
    (local / name).write_text(name)
  folder = path.as_path(f"{bucket}/folders/model")
  path.upload_folder(local, folder, last=["config.json"])
  cache = [tmp_path / "cache"] * 4
  copies = map_threads(lambda f: path.local_copy(folder, cache=f), cache)
  assert len(set(copies)) == 1
  names = {str(f.relative_to(copies[0])) for f in copies[0].rglob("*")}
  assert names == {"config.json", "weights", "sub", "sub/x"}
  assert (copies[0] / "sub" / "x").read_text() == "sub/x"


@pytest.mark.slow
def test_patterns(bucket):
  folder = f"{bucket}/patterns"
  for i in range(4):
    path.write_bytes(path.as_path(f"{folder}/{i:05d}.tar"), b"x")
  files = [f"{folder}/{i:05d}.tar" for i in range(4)]
  for pattern in ("*.tar", "{00000..00003}.tar", "0000{0,1,2,3}.tar"):
    assert list(map(str, expand_path(f"{folder}/{pattern}"))) == files
  assert list(map(str, expand_path(files))) == files
  for wrong, message in (
    (f"{folder}/{{00003..00005}}.tar", r"2 of 3 files .*00004\.tar.*4 of 4"),
    (f"{folder}/nothing/*.tar", "no folder"),
    (f"{bucket.partition(':')[0]}://nope/*.tar", "no folder .*://nope"),
    (folder, r"write '.*/\*\.tar'"),
    ([files[0], f"{folder}/*.tar"], "in the path twice"),
  ):
    with pytest.raises(UserError, match=message):
      expand_path(wrong)


def test_a_folder_with_brackets_is_removed_alone(bucket):
  folders = [path.as_path(f"{bucket}/brackets/{n}") for n in ("x[1]", "x1")]
  for folder in folders:
    path.write_bytes(folder / "part", b"")
  path.remove_folder(folders[0])
  assert [path.exists(f / "part") for f in folders] == [False, True]
