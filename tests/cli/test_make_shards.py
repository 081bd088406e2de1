"""Listings of images with captions, written to shards."""

import csv
import functools
import hashlib
import json
import tarfile

import cv2
import numpy as np
import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.data.sources import listings, shard_writer
from mtv_jax.data.sources.array_record import ArrayRecordSource
from mtv_jax.data.sources.webdataset import WebDatasetSource

main = functools.partial(run_command, "make_shards")


def encoded(seed, extension=".jpg", size=(12, 16)):
  image = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
  return cv2.imencode(extension, image)[1].tobytes()


@pytest.fixture
def photos(tmp_path):
  folder = tmp_path / "photos"
  folder.mkdir()
  for i in range(7):
    (folder / f"{i}.jpg").write_bytes(encoded(i))
  return folder


def table(path, rows, header=("image", "caption"), delimiter=","):
  with path.open("w", newline="", encoding="utf-8") as file:
    csv.writer(file, delimiter=delimiter).writerows([header, *rows])
  return path


def examples_of(folder, count=7):
  return [
    listings.Example(f"{i}.jpg", folder / f"{i}.jpg", [f"caption {i}", "more"])
    for i in range(count)
  ]


# --- Listings ----------------------------------------------------------------


def test_csv_groups_the_rows_of_an_image(photos, tmp_path):
  rows = [("1.jpg", "a"), ("0.jpg", "b, c"), ("1.jpg", " d "), ("2.jpg", "")]
  actual = listings.read(table(tmp_path / "x.csv", rows), images=photos)
  assert [(e.name, e.captions, e.problem) for e in actual] == [
    ("1.jpg", ["a", "d"], ""),
    ("0.jpg", ["b, c"], ""),
    ("2.jpg", [], "no caption"),
  ]
  assert actual[0].path == photos / "1.jpg"


def test_tsv_names_its_columns_and_paths_are_relative_to_it(photos):
  path = table(
    photos / "x.tsv", [("2.jpg", "zwei\nZeilen")], ("file", "text"), "\t"
  )
  (actual,) = listings.read(path, image_column="file", caption_column="text")
  assert actual.path.read_bytes() == encoded(2)
  path = table(photos / "x.csv", [("2.jpg", "a, b")], ("image", "a, b"), ";")
  (row,) = listings.read(path, caption_column="a, b")
  assert row.captions == ["a, b"]
  assert actual.captions == ["zwei\nZeilen"]


def test_parquet_with_lists_of_captions(photos, tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  path, names = tmp_path / "x.parquet", ["3.jpg", "4.jpg", "5.jpg"]
  captions = [["a", "b"], [], None]
  columns = {"width": [1, 2, 3], "caption": captions, "image": names}
  parquet.write_table(pyarrow.table(columns), path)
  actual = listings.read(path, images=photos)
  assert [e.name for e in actual] == names
  assert [e.captions for e in actual] == [["a", "b"], [], []]
  with pytest.raises(ValueError, match="no column 'captions'.*'caption'"):
    listings.read(path, images=photos, caption_column="captions")
  rows = pyarrow.table({"image": [b"\xff\xd8"], "caption": ["a"]})
  parquet.write_table(rows, path)
  with pytest.raises(ValueError, match="must contain paths, got bytes"):
    listings.read(path)


def test_coco_captions(photos, tmp_path):
  numbers = {9: "1.jpg", 4: "0.jpg", 5: "2.jpg"}
  captions = [(4, "second\n"), (4, "first"), (9, None), (5, 3), (5, "one")]
  content = {
    "images": [{"id": i, "file_name": name} for i, name in numbers.items()],
    "annotations": [{"image_id": i, "caption": text} for i, text in captions],
  }
  path = tmp_path / "captions.json"
  path.write_text(json.dumps(content))
  actual = listings.read(path, images=photos)
  # Captions other than text are dropped.
  assert [(e.name, e.captions, e.extra, e.problem) for e in actual] == [
    ("1.jpg", [], {"image_id": 9}, "no caption"),
    ("0.jpg", ["second", "first"], {"image_id": 4}, ""),
    ("2.jpg", ["one"], {"image_id": 5}, ""),
  ]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"annotations": None}, "'annotations' is missing; expected a list"),
    (
      {"annotations": [{"bbox": [], "image_id": 3}]},
      r"annotations\[0\] has no 'caption'.*captions_.*not instances",
    ),
    ({"images": [{"id": 1}]}, r"images\[0\] has no 'file_name'"),
    ({}, "lists no image"),
  ],
)
def test_json_other_than_coco_captions_raises(tmp_path, change, message):
  content = {"images": [], "annotations": [], **change}
  (tmp_path / "x.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match=message):
    listings.read(tmp_path / "x.json")


def test_folder(photos):
  (photos / "0.txt").write_text("zero")
  (photos / "1.json").write_text('{"captions": ["one", "uno"]}')
  (photos / "2.txt").write_bytes(b"\xff")
  (photos / "sub").mkdir()
  (photos / "sub" / "x.PNG").write_bytes(encoded(9, ".png"))
  (photos / "sub" / "x.txt").write_text("x")
  (photos / "lost.txt").write_text("lost")
  (photos / "notes.md").write_text("no part of it")
  actual = {e.name: e for e in listings.read(photos)}
  assert list(actual) == [f"{i}.jpg" for i in range(7)] + [
    "lost.txt",
    "sub/x.PNG",
  ]
  assert actual["0.jpg"].captions == ["zero"]
  assert actual["1.jpg"].captions == ["one", "uno"]
  assert "not UTF-8" in actual["2.jpg"].problem
  assert actual["3.jpg"].problem == "no caption"
  assert actual["lost.txt"].problem == "no image beside it"
  assert actual["sub/x.PNG"].captions == ["x"]
  assert actual["3.jpg"].path == photos / "3.jpg"
  for name in ("x.heic", "y.avif"):
    (photos / name).touch()
  (photos / "x.txt").write_text("x")
  (photos / "3.png").touch()  # Without captions, another image.
  problems = {e.name: e.problem for e in listings.read(photos)}
  assert "unsupported format (.heic): convert to JPEG" in problems["x.heic"]
  assert problems["3.png"] == problems["3.jpg"] == "no caption"
  listed = listings.list_images(photos)
  unread = {e.name for e in listed if "unsupported format" in e.problem}
  assert unread == {"x.heic", "y.avif"}
  (photos / "0.png").write_bytes(b"")
  with pytest.raises(ValueError, match="two files for one example"):
    listings.read(photos)


@pytest.mark.parametrize(
  ("name", "error", "message"),
  [
    ("nowhere.csv", FileNotFoundError, "no .*nowhere.csv"),
    ("x.xlsx", ValueError, "ends in .json, .csv"),
    ("empty.csv", ValueError, "no column 'image' .*There are none"),
    ("header.csv", ValueError, "lists no image"),
    ("other.csv", ValueError, "Did you mean 'images'.*image_column"),
    ("latin.csv", ValueError, "latin.csv is not UTF-8, near line .*iconv"),
    ("open.csv", ValueError, "open.csv, near line .*quotation mark not clos"),
    ("comma.csv", ValueError, "comma.csv, line 3: 1 .* from ' a cat'"),
    ("cut.json", ValueError, "cut.json is not JSON"),
    ("list.json", ValueError, "but has <class 'list'>"),
    ("half.json", ValueError, r"'annotations' but has \['images'\]"),
    ("x.parquet", ValueError, r"x\.parquet is not a Parquet file"),
  ],
)
def test_unreadable_listings_raise(tmp_path, name, error, message):
  contents = {
    "x.xlsx": "",
    "empty.csv": "",
    "header.csv": "image,caption\n",
    "other.csv": "images,caption\n",
    "latin.csv": "image,caption\na,caf\xe9\n",
    "open.csv": 'image,caption\na,"' + "x\n" * 70_000,
    "comma.csv": "image,caption\n0.jpg,ok\n1.jpg,a dog, a cat\n",
    "cut.json": '{"images": [',
    "list.json": "[1]",
    "half.json": '{"images": []}',
    "x.parquet": "nothing of the kind",
  }
  if name in contents:
    (tmp_path / name).write_text(contents[name], encoding="latin-1")
  with pytest.raises(error, match=message):
    listings.read(tmp_path / name)
  path = table(tmp_path / "x.csv", [("a", "b")])
  with pytest.raises(FileNotFoundError, match="no folder of images .*nowhere"):
    listings.read(path, images=tmp_path / "nowhere")


# --- Shards ------------------------------------------------------------------


def decode(data):
  return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def members(path):
  with tarfile.open(path) as tar:
    return {m.name: tar.extractfile(m).read() for m in tar}


def test_layout_is_that_of_img2dataset(photos, tmp_path):
  out = tmp_path / "out"
  report = shard_writer.write(examples_of(photos), out, records_per_shard=3)
  assert report.shards == [out / f"{i:05d}.tar" for i in range(3)]
  assert (report.total, report.done, report.written) == (7, 7, 7)
  assert {p.name for p in out.iterdir()} == {"blocks.npz"} | {
    f"{i:05d}{end}" for i in range(3) for end in (".tar", "_stats.json")
  }
  actual = members(out / "00001.tar")
  assert list(actual) == [
    f"00001{row}.{end}" for row in range(3) for end in ("jpg", "json", "txt")
  ]
  assert actual["000011.jpg"] == encoded(4)
  assert actual["000011.txt"] == b"caption 4"
  assert json.loads(actual["000011.json"]) == dict(
    caption="caption 4", captions=["caption 4", "more"], key="000011",
    status="success", error_message=None, width=16, height=12,
    original_width=16, original_height=12, url="4.jpg",
    sha256=hashlib.sha256(encoded(4)).hexdigest(),
  )  # fmt: skip
  assert json.loads((out / "00002_stats.json").read_text()) == dict(
    count=1, successes=1, failed_to_download=0, failed_to_resize=0,
    status_dict={"success": 1},
  )  # fmt: skip


def test_bad_images_leave_gaps_and_are_listed(photos, tmp_path):
  whole = (photos / "1.jpg").read_bytes()
  (photos / "1.jpg").write_bytes(whole[: len(whole) // 2])
  (photos / "2.jpg").write_bytes(b"<html>")
  (photos / "4.jpg").unlink()
  examples = examples_of(photos)
  examples[5].problem = "no caption"
  out = tmp_path / "out"
  seen = []
  report = shard_writer.write(
    examples,
    out,
    records_per_shard=4,
    progress=lambda r: seen.append((r.done, len(r.skipped))),
  )
  assert [s.name for s in report.skipped] == [f"{i}.jpg" for i in (1, 2, 4, 5)]
  assert report.written == 3
  assert seen[-1] == (7, 4)
  lines = (out / "skipped.jsonl").read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  assert [line["name"] for line in lines] == [s.name for s in report.skipped]
  assert all(line["reason"] for line in lines)
  assert "No such file" in lines[2]["reason"]
  stats = json.loads((out / "00001_stats.json").read_text())
  assert (stats["count"], stats["successes"]) == (3, 1)
  assert (stats["failed_to_download"], stats["failed_to_resize"]) == (1, 1)
  source = WebDatasetSource(f"{out}/*.tar")
  # A row's key does not depend on whether other rows are skipped.
  assert [source[i]["key"] for i in range(3)] == ["000000", "000003", "000012"]


def test_unusable_images_and_outputs_raise(photos, tmp_path):
  examples = [
    listings.Example(f"{i}.jpg", photos / f"{i}x.jpg", ["c"]) for i in range(3)
  ]
  match = r"None of the 3 .*3 times 'No such file.* at .*0x\.jpg"
  with pytest.raises(ValueError, match=match):
    shard_writer.write(examples, tmp_path / "none", records_per_shard=2)
  assert [f.name for f in (tmp_path / "none").iterdir()] == ["skipped.jsonl"]
  (tmp_path / "file").touch()
  with pytest.raises(NotADirectoryError, match="file is a file; pass a folder"):
    shard_writer.write(examples_of(photos), tmp_path / "file")
  shard_writer.write(examples_of(photos), tmp_path / "out")
  match = r"contains 1 shards \(00000.tar, ...\): remove them, or choose"
  with pytest.raises(FileExistsError, match=match):
    shard_writer.write(examples_of(photos), tmp_path / "out")
  for name, value in dict(format="x", records_per_shard=0, max_side=0).items():
    with pytest.raises(ValueError, match=name):
      shard_writer.write(examples_of(photos), tmp_path / "new", **{name: value})


def test_equal_input_gives_equal_bytes(photos, tmp_path):
  for name in ("a", "b"):
    shard_writer.write(examples_of(photos), tmp_path / name)
  for path in (tmp_path / "a").iterdir():
    assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
  # tarfile and the offset index list equal members, of nine digits.
  files = members(tmp_path / "a" / "00000.tar")
  source = WebDatasetSource(tmp_path / "a" / "00000.tar")
  for i in range(7):
    assert source[i]["image"] == files[f"{i:09d}.jpg"]


def test_an_interrupted_shard_does_not_appear(photos, tmp_path):
  def stop(report):
    if report.done > 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    shard_writer.write(
      examples_of(photos), tmp_path / "out", records_per_shard=3, progress=stop
    )
  assert [p.name for p in (tmp_path / "out").iterdir() if ".tar" in p.name] == [
    "00000.tar"
  ]


def test_max_side_shrinks_and_keeps_the_rest(photos, tmp_path):
  blue = np.zeros((100, 40, 3), np.uint8)
  blue[..., 0] = 255  # OpenCV's order
  (photos / "0.jpg").write_bytes(cv2.imencode(".png", blue)[1].tobytes())
  shard_writer.write(examples_of(photos, 2), tmp_path / "out", max_side=50)
  actual = members(tmp_path / "out" / "00000.tar")
  # A PNG by its bytes, despite its name; after resizing it is a JPEG.
  meta = json.loads(actual["000000000.json"])
  assert (meta["height"], meta["width"]) == (50, 20)
  assert (meta["original_height"], meta["original_width"]) == (100, 40)
  image = decode(actual["000000000.jpg"])
  assert image.shape == (50, 20, 3)
  np.testing.assert_allclose(image.mean((0, 1)), [255, 0, 0], atol=3)
  assert actual["000000001.jpg"] == encoded(1)


def test_extensions_follow_the_bytes(tmp_path):
  examples = []
  for i, extension in enumerate((".png", ".webp", ".bmp")):
    (tmp_path / f"{i}.jpg").write_bytes(encoded(i, extension))
    examples.append(listings.Example(f"{i}", tmp_path / f"{i}.jpg", ["c"]))
  shard_writer.write(examples, tmp_path / "out")
  actual = members(tmp_path / "out" / "00000.tar")
  assert actual["000000000.png"] == encoded(0, ".png")
  assert actual["000000001.webp"] == encoded(1, ".webp")
  # Formats without an img2dataset extension are stored losslessly.
  pixels, expected = actual["000000002.png"], encoded(2, ".bmp")
  np.testing.assert_array_equal(decode(pixels), decode(expected))


# --- The tool ----------------------------------------------------------------


def test_tool_on_real_coco(shared_data, tmp_path, capsys):
  coco = shared_data / "coco"
  splits = ("train2017", "val2017")
  inputs = [f"{coco}/annotations/captions_{split}.json" for split in splits]
  folders = [f"{coco}/{split}" for split in splits]
  out = tmp_path / "out"
  options = [f"--output={out}", "--records_per_shard=100"]
  assert not main([*inputs, "--images", *folders, *options])
  captured = capsys.readouterr()
  assert "313 records in 4 shards" in captured.out
  assert "0 skipped" in captured.out and "313 of 313 images" in captured.err
  source = WebDatasetSource(f"{out}/{{00000..00003}}.tar")
  assert source.shards.tolist() == [100, 200, 300, 313]
  at = 0
  for path, split in zip(inputs, splits, strict=True):
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
    captions = {}
    for annotation in content["annotations"]:
      captions.setdefault(annotation["image_id"], []).append(
        annotation["caption"].strip()
      )
    for image in content["images"]:
      record = source[at]
      assert record["key"] == f"{at // 100:05d}{at % 100:02d}"
      assert record["captions"] == captions[image["id"]]
      photo = coco / split / image["file_name"]
      assert record["image"] == photo.read_bytes()
      at += 1
  assert at == 313


def test_tool_writes_array_records(photos, tmp_path, capsys):
  (photos / "3.jpg").write_bytes(b"no image")
  rows = [(f"{i}.jpg", f"c{i}") for i in range(7)]
  path = table(photos / "x.csv", rows)
  out = tmp_path / "out"
  options = ["--format=array_record", "--records_per_shard=4"]
  assert not main([str(path), f"--output={out}", *options])
  captured = capsys.readouterr().out
  assert "6 records in 2 shards" in captured and "3.jpg: " in captured
  source = ArrayRecordSource(f"{out}/*.array_record")
  last = {"key": "000012", "image": encoded(6), "captions": ["c6"]}
  assert len(source) == 6 and source[5] == last


def test_tool_reports_errors_in_a_line(tmp_path, capsys):
  with pytest.raises(SystemExit) as exit:
    main([f"{tmp_path}/x.csv", f"--output={tmp_path}/out"])
  assert exit.value.code == f"make_shards: There is no {tmp_path}/x.csv."
  with pytest.raises(SystemExit, match="2 folders for 3 inputs"):
    main(["a", "b", "c", "--images", "d", "e", "--output=f"])
  with pytest.raises(SystemExit, match="is in the input .*: name a folder els"):
    main([str(tmp_path), f"--output={tmp_path}/out"])


def test_splits_that_are_taken(photos, tmp_path, capsys):
  for split in ("train", "val"):
    (tmp_path / "all" / split).mkdir(parents=True)
    for name in ("0.jpg", "1.jpg"):
      (tmp_path / "all" / split / name).symlink_to(photos / name)
      (tmp_path / "all" / split / name).with_suffix(".txt").write_text("c")
  out = tmp_path / "out"
  assert not main([f"{tmp_path}/all", f"--output={out}"])
  text = capsys.readouterr().out
  assert f"using all splits; for one split, pass {tmp_path}/all/train." in text
  assert "4 records in 1 shards" in text
  (out / "00000.tar").rename(out / "train.tar")
  (out / "val.tar").touch()
  assert not main([str(out), f"--output={tmp_path}/second"])
  assert "reading WebDatasetSource(train.tar, 4" in capsys.readouterr().out


def test_shards_of_other_formats(photos, tmp_path, capsys):
  """Tars, and Parquet with encoded images as on the hub."""
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  tars = tmp_path / "tars"
  shard_writer.write(examples_of(photos), tars, records_per_shard=3)
  rows = list(WebDatasetSource(f"{tars}/*.tar"))
  images = [{"bytes": r["image"], "path": None} for r in rows]
  images[2]["bytes"] = b"damaged"
  columns = {"image": images, "text": [r["captions"] for r in rows]}
  (tmp_path / "hub").mkdir()
  parquet.write_table(pyarrow.table(columns), tmp_path / "hub" / "0.parquet")
  for name, count in (("tars", 7), ("hub", 6)):
    out = tmp_path / f"of_{name}"
    assert main([str(tmp_path / name), f"--output={out}"]) == 0
    assert f"{count} records in 1 shards" in capsys.readouterr().out
    copied = list(WebDatasetSource(f"{out}/*.tar"))
    kept = [r for i, r in enumerate(rows) if count == 7 or i != 2]
    for actual, expected in zip(copied, kept, strict=True):
      assert actual["image"] == expected["image"]
      assert actual["captions"] == expected["captions"]
