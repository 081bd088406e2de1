"""Parquet files of the hub, against a local stand-in that counts requests."""

import io
import re

import numpy as np
import pytest
from hub_server import serve
from PIL import Image

from mtv_jax.cli.main import main
from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.registry import open_files
from mtv_jax.data.sources.webdataset import WebDatasetSource
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.utils import buckets, path, path_patterns
from mtv_jax.utils.errors import InputError, MissingFileError, StorageError

pytestmark = pytest.mark.slow

FILES, GROUPS, ROWS, BATCH = 4, 4, 4, 16
NAME, URL = "datasets/lab/pairs", "hf://datasets/lab/pairs"


def write(first):
  """A Parquet file of four row groups, of images from a number on."""
  pa = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  numbers = range(first, first + GROUPS * ROWS)
  images = []
  for number in numbers:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, "PNG")
    images.append({"bytes": file.getvalue(), "path": None})
  columns = {"image": images, "text": [f"image {n}" for n in numbers]}
  stream = io.BytesIO()
  parquet.write_table(pa.table(columns), stream, row_group_size=ROWS)
  return stream.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
  monkeypatch.setattr(buckets, "_FIRST_WAIT", 0.0)
  path_patterns._find_commit.cache_clear()
  with serve(tmp_path / "cache") as found:
    found.create(NAME)
    files = {
      f"data/train-{i}.parquet": write(i * GROUPS * ROWS) for i in range(FILES)
    }
    found.first = found.commit(NAME, "main", files | {"README.md": b""})
    yield found
  path_patterns._find_commit.cache_clear()


def read(data, steps, *, index=0, count=1, **options):
  common = dict(ops="decode|canvas(8)|caption(16)", shuffle="lanes", lanes=4)
  with make_loader(
    common | data | options,
    batch_size=BATCH,
    seed=0,
    start_step=steps[0],
    process_index=index,
    process_count=count,
    tokenizer=build_tokenizer("bytes"),
  ) as loader:
    return [next(loader) for _ in steps]


def entry(where, **options):
  train = dict(type="parquet", path=f"{where}/data/train-*.parquet", **options)
  return dict(train=[train], window=16)


def assert_part(batches, whole, index, count):
  for batch, expected in zip(batches, whole, strict=True):
    for name, values in expected.items():
      part = np.split(values, count)[index]
      np.testing.assert_array_equal(batch[name], part, err_msg=name)


def ranges(requests):
  return [line for line in requests if "/storage/" in line]


@pytest.fixture
def whole(tmp_path, hub):
  """The batches of a local copy."""
  for name, data in hub.commits[hub.first].items():
    path.write_bytes(tmp_path / "copy" / name, data)
  return read(entry(tmp_path / "copy"), range(10))


def test_hosts_read_row_groups_once(hub, whole):
  for index in range(2):
    hub.requests.clear()
    part = read(entry(URL), range(4), index=index, count=2)
    assert_part(part, whole[:4], index, 2)
    # Each footer twice, at the start and with the first group, the groups of
    # this epoch, and those of the next one that are read ahead.
    share = FILES * GROUPS // 2
    count = len(ranges(hub.requests)) - 2 * FILES
    assert share <= count <= 3 * share
    assert sum("/api/" in line for line in hub.requests) <= 4


def test_a_table_elsewhere(hub, tmp_path, whole):
  data = f"{URL}/data/train-*.parquet"
  with pytest.raises(InputError, match="the hub's data sets are read-only"):
    main(["index", data, "--processes=1", "--debug"])
  assert main(["index", data, f"--output={tmp_path}/t", "--processes=1"]) == 0
  hub.requests.clear()
  source = open_files(data, blocks=f"{tmp_path}/t/blocks.npz")
  assert len(ranges(hub.requests)) == 1  # For the schema.
  assert len(source) == FILES * GROUPS * ROWS
  table = entry(URL, blocks=f"{tmp_path}/t/blocks.npz")
  assert_part(read(table, range(3), workers=1), whole[:3], 0, 1)
  hub.commit(NAME, "v2", hub.commits[hub.first])
  hub.commit(NAME, "v2", {"data/train-1.parquet": write(0)})
  with pytest.raises(InputError, match="1 of 4 shards .* have changed"):
    other = data.replace("/pairs/", "/pairs@v2/")
    open_files(other, blocks=f"{tmp_path}/t/blocks.npz")


def test_a_data_set_by_its_name(hub, whole):
  hub.commit(NAME, "v3", hub.commits[hub.first])
  hub.commit(NAME, "v3", {"data/test-0.parquet": write(0)})
  for url in (URL, f"{URL}@v3"):
    named = {"path": path_patterns.pin_all(url, {})}
    assert_part(read(dict(train=[named]), range(2)), whole[:2], 0, 1)


def test_a_resume_reads_the_recorded_commit(hub, whole):
  commits = {}
  first = path_patterns.pin_all(entry(URL), commits)
  assert commits == {f"{NAME}@main": hub.first}
  hub.commit(NAME, "main", {"data/train-1.parquet": write(0)})
  path_patterns._find_commit.cache_clear()
  again = path_patterns.pin_all(entry(URL), dict(commits))
  assert again == first != path_patterns.pin_all(entry(URL), {})
  for index in range(2):
    part = read(again, range(5, 8), index=index, count=2)
    assert_part(part, whole[5:8], index, 2)


def test_revisions(hub):
  hub.commit(NAME, "refs/convert/parquet", {"data/0.parquet": write(7)})
  name = f"{URL}@refs/convert/parquet/data/0.parquet"
  assert open_files(name)[0]["captions"] == ["image 7"]
  pinned = f"{URL}@{hub.first}/data/train-{{0,3}}.parquet"
  assert len(open_files(pinned)) == 2 * GROUPS * ROWS


@pytest.mark.parametrize(
  ("name", "error", "match"),
  [
    ("lab/none/a.parquet", StorageError, "no such repository, or it is priv"),
    ("lab/pairs@v9/a.parquet", StorageError, "has no such revision"),
    ("lab/pairs/a.parquet", MissingFileError, "1 of 1 files are missing"),
    ("lab/pairs/data/*.tar", MissingFileError, "matches no file"),
    ("lab", InputError, "names no file of a data set; expected hf://"),
    ("lab/gated/data/0.parquet", StorageError, "is gated: accept its terms"),
  ],
)
def test_what_the_hub_lacks_or_refuses(hub, monkeypatch, name, error, match):
  monkeypatch.delenv("HF_TOKEN")
  hub.create("datasets/lab/gated")
  hub.commit("datasets/lab/gated", "main", {"data/0.parquet": write(0)})
  hub.gated.add("datasets/lab/gated")
  with pytest.raises(Exception, match=re.escape(match)) as caught:
    open_files([f"hf://datasets/{name}"], captions="optional")
  assert "\n" not in str(caught.value)
  assert isinstance(caught.value, error | IsADirectoryError)


def test_no_network(hub, monkeypatch):
  monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
  with pytest.raises(
    StorageError, match=r"pairs@main can't be read: .*refused"
  ):
    WebDatasetSource(f"{URL}/a.tar")
