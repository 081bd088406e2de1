"""Listings of images with captions, written to shards."""

import csv
import functools
import hashlib
import io
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


def examples_of(folder, count=7, captions=1):
  return [
    listings.Example(
      f"{i}.jpg", folder / f"{i}.jpg", [f"caption {i} {j}" for j in
                                        range(captions)]
    )
    for i in range(count)
  ]  # fmt: skip


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


def test_a_comma_outside_of_quotation_marks_loses_no_words(photos, tmp_path):
  path = tmp_path / "x.csv"
  path.write_text("image,caption\n0.jpg,ok\n1.jpg,a dog, a cat\n")
  with pytest.raises(ValueError, match=r"x.csv, line 3: 1 .* from ' a cat'"):
    listings.read(path, images=photos)


def test_tsv_names_its_columns_and_paths_are_relative_to_it(photos):
  path = table(
    photos / "x.tsv", [("2.jpg", "zwei\nZeilen")], ("file", "text"), "\t"
  )
  (actual,) = listings.read(path, image_column="file", caption_column="text")
  assert actual.path.read_bytes() == encoded(2)
  assert actual.captions == ["zwei\nZeilen"]


def test_parquet_with_lists_of_captions(photos, tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  rows = pyarrow.table(
    {
      "width": [1, 2, 3],
      "caption": [["a", "b"], [], None],
      "image": ["3.jpg", "4.jpg", "5.jpg"],
    }
  )
  parquet.write_table(rows, tmp_path / "x.parquet")
  actual = listings.read(tmp_path / "x.parquet", images=photos)
  assert [(e.name, e.captions) for e in actual] == [
    ("3.jpg", ["a", "b"]),
    ("4.jpg", []),
    ("5.jpg", []),
  ]
  with pytest.raises(ValueError, match="no column 'captions'.*'caption'"):
    listings.read(
      tmp_path / "x.parquet", images=photos, caption_column="captions"
    )


def test_parquet_of_bytes_raises(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  rows = pyarrow.table({"image": [b"\xff\xd8"], "caption": ["a"]})
  parquet.write_table(rows, tmp_path / "x.parquet")
  with pytest.raises(ValueError, match="must contain paths, got bytes"):
    listings.read(tmp_path / "x.parquet")


def test_coco_captions(photos, tmp_path):
  content = {
    "images": [
      {"id": 9, "file_name": "1.jpg"},
      {"id": 4, "file_name": "0.jpg"},
    ],
    "annotations": [
      {"id": 2, "image_id": 4, "caption": "second\n"},
      {"id": 1, "image_id": 4, "caption": "first"},
    ],
  }
  path = tmp_path / "captions.json"
  path.write_text(json.dumps(content))
  actual = listings.read(path, images=photos)
  assert [(e.name, e.captions, e.extra) for e in actual] == [
    ("1.jpg", [], {"image_id": 9}),
    ("0.jpg", ["second", "first"], {"image_id": 4}),
  ]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({"images": []}, r"needs 'images' and 'annotations', it has \['images'\]"),
    ([1], "it has <class 'list'>"),
    (
      {"images": [], "annotations": [{"bbox": [], "image_id": 3}]},
      r"annotations\[0\] has no 'caption'.*captions_.*not instances",
    ),
    (
      {"images": [], "annotations": [{"caption": "a"}]},
      r"annotations\[0\] has no 'image_id', only \['caption'\]",
    ),
    (
      {"images": {}, "annotations": []},
      "'images' is of type dict; expected a list",
    ),
    (
      {"images": [3], "annotations": []},
      r"images\[0\] is of type int; expected an object",
    ),
    (
      {"images": [{"id": 1}], "annotations": []},
      r"images\[0\] has no 'file_name'",
    ),
    ({"images": [], "annotations": []}, "lists no image"),
  ],
)
def test_json_other_than_coco_captions_raises(tmp_path, content, message):
  (tmp_path / "x.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match=message):
    listings.read(tmp_path / "x.json")


def test_coco_captions_other_than_text_are_dropped(photos):
  content = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
    "annotations": [
      {"image_id": 0, "caption": None},
      {"image_id": 1, "caption": 3},
      {"image_id": 1, "caption": "one"},
    ],
  }
  (photos / "x.json").write_text(json.dumps(content))
  first, second = listings.read(photos / "x.json")
  assert first.problem == "no caption"
  assert second.captions == ["one"]


def test_invalid_parquet_file_raises(tmp_path):
  pytest.importorskip("pyarrow")
  (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
  with pytest.raises(ValueError, match=r"x\.parquet is not a Parquet file"):
    listings.read(tmp_path / "x.parquet")


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
    ("cut.json", ValueError, "cut.json is not JSON"),
  ],
)
def test_unreadable_listings_raise(tmp_path, name, error, message):
  (tmp_path / "x.xlsx").touch()
  (tmp_path / "empty.csv").touch()
  table(tmp_path / "header.csv", [])
  table(tmp_path / "other.csv", [], ("images", "caption"))
  (tmp_path / "latin.csv").write_bytes(
    "image,caption\na,caf\xe9\n".encode("l1")
  )
  (tmp_path / "open.csv").write_text('image,caption\na,"' + "x\n" * 70_000)
  (tmp_path / "cut.json").write_text('{"images": [')
  with pytest.raises(error, match=message):
    listings.read(tmp_path / name)


def test_missing_image_folder_raises(tmp_path):
  path = table(tmp_path / "x.csv", [("a", "b")])
  with pytest.raises(FileNotFoundError, match="no folder of images .*nowhere"):
    listings.read(path, images=tmp_path / "nowhere")


# --- Shards ------------------------------------------------------------------


def members(path):
  with tarfile.open(path) as tar:
    return {m.name: tar.extractfile(m).read() for m in tar}


def test_layout_is_that_of_img2dataset(photos, tmp_path):
  out = tmp_path / "out"
  report = shard_writer.write(examples_of(photos, captions=2), out,
                        records_per_shard=3)  # fmt: skip
  assert report.shards == [out / f"{i:05d}.tar" for i in range(3)]
  assert (report.total, report.done, report.written) == (7, 7, 7)
  assert sorted(p.name for p in out.iterdir()) == sorted(
    f"{i:05d}{end}" for i in range(3) for end in (".tar", "_stats.json")
  )
  actual = members(out / "00001.tar")
  assert list(actual) == [
    f"00001{row}.{end}" for row in range(3) for end in ("jpg", "json", "txt")
  ]
  assert actual["000011.jpg"] == encoded(4)
  assert actual["000011.txt"] == b"caption 4 0"
  assert json.loads(actual["000011.json"]) == {
    "caption": "caption 4 0",
    "captions": ["caption 4 0", "caption 4 1"],
    "key": "000011",
    "status": "success",
    "error_message": None,
    "width": 16,
    "height": 12,
    "original_width": 16,
    "original_height": 12,
    "sha256": hashlib.sha256(encoded(4)).hexdigest(),
    "url": "4.jpg",
  }
  assert json.loads((out / "00002_stats.json").read_text()) == {
    "count": 1,
    "successes": 1,
    "failed_to_download": 0,
    "failed_to_resize": 0,
    "status_dict": {"success": 1},
  }


def test_default_keys_have_nine_digits(photos, tmp_path):
  shard_writer.write(examples_of(photos), tmp_path / "out")
  assert "000000006.jpg" in members(tmp_path / "out" / "00000.tar")


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
  assert [json.loads(line)["name"] for line in lines] == [
    "1.jpg",
    "2.jpg",
    "4.jpg",
    "5.jpg",
  ]
  assert all(json.loads(line)["reason"] for line in lines)
  assert "No such file" in json.loads(lines[2])["reason"]
  stats = json.loads((out / "00001_stats.json").read_text())
  assert (stats["count"], stats["successes"]) == (3, 1)
  assert (stats["failed_to_download"], stats["failed_to_resize"]) == (1, 1)
  source = WebDatasetSource(f"{out}/*.tar")
  # A row's key does not depend on whether other rows are skipped.
  assert [source[i]["key"] for i in range(3)] == ["000000", "000003", "000012"]


def test_input_without_usable_images_raises(tmp_path, photos):
  examples = [
    listings.Example(f"{i}.jpg", photos / f"{i}x.jpg", ["c"]) for i in range(3)
  ]
  with pytest.raises(
    ValueError, match=r"None of the 3 .*3 times 'No such file.* at .*0x\.jpg"
  ):
    shard_writer.write(examples, tmp_path / "out")


def test_equal_input_gives_equal_bytes(photos, tmp_path):
  for name in ("a", "b"):
    shard_writer.write(
      examples_of(photos), tmp_path / name, records_per_shard=4
    )
  for path in (tmp_path / "a").iterdir():
    assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_output_that_is_a_file_raises(photos, tmp_path):
  (tmp_path / "out").touch()
  with pytest.raises(NotADirectoryError, match="out is a file; give a folder"):
    shard_writer.write(examples_of(photos), tmp_path / "out")


def test_a_folder_with_shards_raises(photos, tmp_path):
  shard_writer.write(examples_of(photos), tmp_path / "out")
  with pytest.raises(
    FileExistsError, match=r"already contains 1 shards \(00000.tar"
  ):
    shard_writer.write(examples_of(photos), tmp_path / "out")


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


@pytest.mark.parametrize(
  "options",
  [{"format": "tfrecord"}, {"records_per_shard": 0}, {"max_side": 0}],
)
def test_invalid_options_raise(photos, tmp_path, options):
  with pytest.raises(ValueError, match=next(iter(options))):
    shard_writer.write(examples_of(photos), tmp_path / "out", **options)


def test_max_side_shrinks_and_keeps_the_rest(photos, tmp_path):
  (photos / "0.jpg").write_bytes(encoded(0, ".png", (100, 40)))
  shard_writer.write(examples_of(photos, 2), tmp_path / "out", max_side=50)
  actual = members(tmp_path / "out" / "00000.tar")
  # A PNG by its bytes, despite its name; after resizing it is a JPEG.
  meta = json.loads(actual["000000000.json"])
  assert (meta["height"], meta["width"]) == (50, 20)
  assert (meta["original_height"], meta["original_width"]) == (100, 40)
  image = cv2.imdecode(
    np.frombuffer(actual["000000000.jpg"], np.uint8), cv2.IMREAD_COLOR
  )
  assert image.shape == (50, 20, 3)
  assert actual["000000001.jpg"] == encoded(1)


def test_shrunk_colours_are_not_swapped(tmp_path):
  blue = np.zeros((64, 64, 3), np.uint8)
  blue[..., 0] = 255  # OpenCV's order
  (tmp_path / "b.png").write_bytes(cv2.imencode(".png", blue)[1].tobytes())
  example = listings.Example("b.png", tmp_path / "b.png", ["blue"])
  shard_writer.write([example], tmp_path / "out", max_side=32)
  actual = members(tmp_path / "out" / "00000.tar")["000000000.jpg"]
  image = cv2.imdecode(np.frombuffer(actual, np.uint8), cv2.IMREAD_COLOR)
  np.testing.assert_allclose(image.mean((0, 1)), [255, 0, 0], atol=3)


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
  pixels, expected = (
    cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    for data in (actual["000000002.png"], encoded(2, ".bmp"))
  )
  np.testing.assert_array_equal(pixels, expected)


# --- The tool ----------------------------------------------------------------


def test_tool_on_real_coco(shared_data, tmp_path, capsys):
  coco = shared_data / "coco"
  splits = ("train2017", "val2017")
  inputs = [f"{coco}/annotations/captions_{split}.json" for split in splits]
  folders = [f"{coco}/{split}" for split in splits]
  out = tmp_path / "out"
  assert not main(
    [
      *inputs,
      "--images",
      *folders,
      f"--output={out}",
      "--records_per_shard=100",
    ]
  )
  captured = capsys.readouterr()
  assert (
    "313 records in 4 shards" in captured.out and "0 skipped" in captured.out
  )
  assert "313 of 313 images" in captured.err
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
  assert not main(
    [str(path), f"--output={out}", "--format=array_record",
     "--records_per_shard=4"]
  )  # fmt: skip
  captured = capsys.readouterr().out
  assert "6 records in 2 shards" in captured and "3.jpg: " in captured
  source = ArrayRecordSource(f"{out}/*.array_record")
  assert len(source) == 6
  assert source[5] == {
    "key": "000012",
    "image": encoded(6),
    "captions": ["c6"],
  }


def test_tool_reports_errors_in_a_line(tmp_path, capsys):
  with pytest.raises(SystemExit) as exit:
    main([f"{tmp_path}/x.csv", f"--output={tmp_path}/out"])
  assert exit.value.code == f"make_shards: There is no {tmp_path}/x.csv."
  with pytest.raises(SystemExit, match="2 folders for 3 inputs"):
    main(["a", "b", "c", "--images", "d", "e", "--output=f"])


def test_readers_of_tars_agree(photos, tmp_path):
  # tarfile and the offset index list equal members.
  shard_writer.write(examples_of(photos), tmp_path / "out", records_per_shard=7)
  source = WebDatasetSource(tmp_path / "out" / "00000.tar")
  data = (tmp_path / "out" / "00000.tar").read_bytes()
  with tarfile.open(fileobj=io.BytesIO(data)) as tar:
    images = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]
  assert [source[i]["image"] for i in range(7)] == images
