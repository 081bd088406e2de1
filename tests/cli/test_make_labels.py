"""Label sets from annotations: COCO's boxes, depth images."""

import functools
import json

import cv2
import numpy as np
import pytest
from dataset_samples import write_members

from mtv_jax.cli.main import run_command
from mtv_jax.config.options import build
from mtv_jax.data.labels import annotations
from mtv_jax.data.labels.annotations import (
  DepthImages,
  Instances,
  Item,
)
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.data.labels.label_values import no_label
from mtv_jax.data.registry import build_source
from mtv_jax.data.sources import listings
from mtv_jax.data.sources import shard_writer as shards_lib
from mtv_jax.data.sources.base import Source

main = functools.partial(run_command, "make_labels")


def item(name="7.jpg", size=(100, 200), **fields):
  return Item(
    **{"key": "k", "name": name, "image_id": "7"} | fields,
    height=size[0],
    width=size[1],
  )


# --- COCO --------------------------------------------------------------------


def coco(path, annotated=(), images=((7, "7.jpg"), (8, "8.jpg"))):
  content = {
    "images": [
      {"id": i, "file_name": name, "height": 100, "width": 200}
      for i, name in images
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "hair drier"}],
    "annotations": [
      {"id": n, "image_id": 7, "iscrowd": 0} | annotation
      for n, annotation in enumerate(annotated)
    ],
  }
  path.write_text(json.dumps(content))
  return path


def test_instances(tmp_path):
  rows = [
    {"bbox": [20, 10, 100, 50], "category_id": 3},
    {"bbox": [0, 0, 10, 10], "category_id": 3, "iscrowd": 1},
    {"bbox": [190, 0, 20, 10], "category_id": 90},
    {"bbox": [5, 5, 0, 10], "category_id": 3},
    {"bbox": [5, 5, 10, -10], "category_id": 3},
  ]
  instances = Instances([coco(tmp_path / "x.json", rows)])
  assert instances(item("8.jpg")).label.boxes.shape == (0, 4)
  unlisted = "boxes: the image is not in the annotations"
  assert instances(item("9.jpg")) == no_label(unlisted)
  outcome = instances(item())
  np.testing.assert_allclose(
    outcome.label.boxes, [[0.1, 0.1, 0.6, 0.6], [0, 0.95, 0.1, 1]], rtol=1e-6
  )
  assert outcome.label.phrases == ("cat", "hair drier")
  assert outcome.label.scores.tolist() == [1, 1]
  assert outcome.counts == {
    "boxes: a crowd, left out": 1,
    "boxes: reached outside the image, cut": 1,
    "boxes: empty": 1,
    "boxes: inverted": 1,
  }


def test_how_records_are_matched(tmp_path):
  box = {"bbox": [20, 10, 100, 50], "category_id": 3}
  file = coco(tmp_path / "x.json", [box])
  by_id = Instances([file], match="image_id")
  assert len(by_id(item("other.jpg", image_id="7")).label.boxes) == 1
  assert by_id(item("7.jpg", image_id="")).label is None
  by_key = Instances([file], match="key")
  assert len(by_key(item("other.jpg", key="7")).label.boxes) == 1
  assert by_key(item("7.jpg")).label is None
  by_name = Instances([file])
  assert len(by_name(item("folder/7.png")).label.boxes) == 1
  with pytest.raises(ValueError, match="'folder/7.png' and 'other/7.jpg'"):
    by_name(item("other/7.jpg"))
  # img2dataset has a record for each caption, of one image.
  assert len(by_name(item("folder/7.png")).label.boxes) == 1
  with pytest.raises(ValueError, match="match is 'file'.*name"):
    Instances([file], match="file")


@pytest.mark.parametrize(
  ("size", "same"),
  [
    ((100, 200), True),
    ((50, 100), True),
    ((333, 667), True),
    ((7, 15), True),
    ((200, 100), False),
    ((256, 256), False),
    ((100, 210), False),
    ((0, 0), False),
  ],
)
def test_shapes(tmp_path, size, same):
  assert item(size=size).has_shape(100, 200) == same
  outcome = Instances([coco(tmp_path / "x.json")])(item(size=size))
  expected = no_label("boxes: annotations of an image of another shape")
  assert (outcome.label is not None) if same else outcome == expected


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "x.json is not JSON"),
    ("[]", "x.json is not a COCO file.*but has <class 'list'>"),
    ('{"images": []}', "needs 'images' and 'annotations' and 'categories'"),
    (
      {"bbox": [0, 0, 1, 1], "category_id": 3, "image_id": 5},
      "annotated image ids .* such as 5",
    ),
    ({"caption": "a cat"}, "has no 'bbox'.*pass instances_"),
  ],
)
def test_invalid_instances(tmp_path, content, message):
  file = coco(tmp_path / "x.json")
  with pytest.raises(ValueError, match="image '7' is listed twice"):
    Instances([file, file])
  if isinstance(content, str):
    file.write_text(content)
  else:
    coco(file, [content])
  with pytest.raises(ValueError, match=message):
    Instances([file])


# --- Depth -------------------------------------------------------------------


def depth_file(path, dtype=np.uint16, size=(50, 100)):
  rows, columns = np.mgrid[: size[0], : size[1]]
  raw = (20 + rows + columns).astype(dtype)
  cv2.imwrite(str(path), raw)
  return raw


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_metric_depth_is_inverted(tmp_path, dtype):
  raw = depth_file(tmp_path / "7.png", dtype, size=(64, 128))
  blocks = raw.reshape(32, 2, 32, 4).astype(np.float64)
  # Near is large, and at the top left.
  for values, pixels, corners in (
    ("metric", 10 / blocks, (65535, 1)),
    ("inverse", blocks / 10, (1, 65535)),
  ):
    sizes = dict(side=32, bits=16)
    annotate = DepthImages(tmp_path, values=values, scale=10, **sizes)
    label = annotate(item()).label
    assert (label.values[0, 0], label.values[-1, -1]) == corners
    step = (label.high - label.low) / 65534
    assert abs(label.inverse_depth - pixels.mean((1, 3))).max() <= step


def test_invalid_depth_values(tmp_path):
  raw = depth_file(tmp_path / "7.png")
  raw[:25] = 0
  raw[:, 50:] = 65535
  cv2.imwrite(str(tmp_path / "7.png"), raw)
  # A distance of 0 is always invalid.
  for invalid in ((0, 65535), (65535,)):
    label = DepthImages(tmp_path, invalid=invalid, side=16)(item()).label
    assert (label.values[8:, :8] > 0).all()
    assert (label.values > 0).sum() == 64


def test_unusable_depth_files(tmp_path):
  depth = DepthImages(tmp_path, side=16)
  assert depth(item()) == no_label("depth: no file for the image")
  file = tmp_path / "7.png"
  depth_file(file)
  half = file.read_bytes()[: file.stat().st_size // 2]
  for content, why in (
    (np.zeros((50, 100, 3), np.uint8), "a file of mode RGB, not grey"),
    (np.eye(50, 90, dtype=np.uint8), "a file of another shape than the image"),
    (half, "a file that is no image, or damaged"),
    (b"no image", "a file that is no image, or damaged"),
    (np.full((50, 100), 7, np.uint8), "a map that is the same everywhere"),
  ):
    if isinstance(content, bytes):
      file.write_bytes(content)
    else:
      cv2.imwrite(str(file), content)
    assert depth(item()) == no_label(f"depth: {why}")
  cv2.imwrite(str(file), np.zeros((50, 100), np.uint8))
  assert depth(item()).label is None


def test_patterns(tmp_path):
  raw = depth_file(tmp_path / "d_7.png")
  (tmp_path / "a").mkdir()
  cv2.imwrite(str(tmp_path / "a" / "k.png"), raw)
  cv2.imwrite(str(tmp_path / "a" / "7.png"), raw)
  for pattern, of in [
    ("d_{stem}.png", item("a/7.jpg")),
    ("d_{image_id}.png", item("x.jpg")),
    ("a/{key}.png", item("x.jpg")),
    ("{name}.png", item("a/7.jpg")),
  ]:
    assert DepthImages(tmp_path, pattern=pattern)(of).label is not None
  by_stem = DepthImages(tmp_path, pattern="d_{stem}.png")
  by_stem(item("a/7.jpg"))
  with pytest.raises(ValueError, match="'a/7.jpg' and 'b/7.jpg'"):
    by_stem(item("b/7.jpg"))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"pattern": "x.png"}, "the same file for every image.*it needs one of {k"),
    ({"pattern": "{id}.png"}, "can't be filled in .*'id'.*{stem}"),
    ({"pattern": "{stem.png"}, "can't be filled in"),
    ({"values": "far"}, "depth.values is 'far'"),
    ({"scale": 0.0}, "depth.scale is 0.0"),
    ({"side": 1}, "depth.side is 1"),
  ],
)
def test_invalid_depth_options(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    build(DepthImages, {"folder": tmp_path, **options}, where="depth")
  with pytest.raises(FileNotFoundError, match="no depth folder nowhere"):
    DepthImages("nowhere")


# --- The base ----------------------------------------------------------------


def photos(folder, names, size=(50, 100)):
  folder.mkdir(exist_ok=True)
  examples = []
  for i, name in enumerate(names):
    image = np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8)
    (folder / name).parent.mkdir(exist_ok=True)
    cv2.imwrite(str(folder / name), image)
    examples.append(listings.Example(name, folder / name, [f"caption {i}"]))
  return examples


@pytest.mark.parametrize("format", ["webdataset", "array_record"])
def test_the_tool_from_shards_to_a_source(tmp_path, format, capsys):
  names = [f"{i}.png" for i in range(5)]
  shards_lib.write(
    photos(tmp_path / "photos", names), tmp_path / "base", format=format,
    records_per_shard=2,
  )  # fmt: skip
  end = {"webdataset": "tar"}.get(format, format)
  base = f"{tmp_path}/base/*.{end}"
  (tmp_path / "metres").mkdir()
  raw = {i: depth_file(tmp_path / "metres" / f"{i}.png") for i in (0, 2, 3)}
  annotated = [
    {"image_id": 3, "bbox": [20, 10, 100, 50], "category_id": 3},
    {"image_id": 3, "bbox": [5, 5, 0, 10], "category_id": 3},
  ]
  file = coco(
    tmp_path / "x.json", annotated, [(i, f"{i}.jpg") for i in (1, 3, 9)]
  )
  depth = [
    "depth", f"--data={base}", f"--output={tmp_path}/labels/depth",
    f"--depth_dir={tmp_path}/metres", "--bits=16", "--metric", "--scale=10",
    "--side=32",
  ]  # fmt: skip
  assert main(depth) == 0
  out = capsys.readouterr().out
  assert "3 of 5 records have a label, in" in out
  assert "2 times: depth: no file for the image" in out
  assert not main(
    ["boxes", f"--data={base}", f"--output={tmp_path}/labels/boxes",
     f"--instances={file}"]
  )  # fmt: skip
  out = capsys.readouterr().out
  assert "2 of 5 records have a label with 1 boxes, in" in out
  assert "3 times: boxes: the image is not in the annotations" in out
  assert "1 times: boxes: empty" in out
  labels = {k: f"{tmp_path}/labels/{k}" for k in ("depth", "boxes")}
  source = build_source({"type": format, "path": base, "labels": labels})
  for i in range(5):
    record = source[i]
    assert ("depth" in record, "boxes" in record) == (i in raw, i in (1, 3))
  np.testing.assert_allclose(
    source[3]["boxes"], [[0.1, 0.1, 0.6, 0.6]], atol=1 / 65535
  )
  assert source[3]["phrases"] == ["cat"] and source[1]["phrases"] == []
  label = LabelSet(tmp_path / "labels" / "depth", kind="depth").read(1, 0).label
  np.testing.assert_array_equal(source[2]["depth"], label.values)
  assert label.values[0, 0] == 65535
  manifest = (tmp_path / "labels" / "depth" / "manifest.json").read_text()
  # As in sets that were written before `bits` was an option.
  assert json.loads(manifest)["settings"] == {
    "from": "depth images", "folder": "metres", "pattern": "{stem}.png",
    "values": "metric", "scale": 10.0, "invalid": [0], "side": 32,
    "min_valid": 16,
  }  # fmt: skip
  # A second run does nothing; summary and file are unchanged.
  assert main(depth) == 0
  assert "3 of 5 records have a label, in" in capsys.readouterr().out
  with pytest.raises(SystemExit) as exit:
    main([*depth[:-1], "--side=16", "--bits=10"])
  assert "finished label set" in exit.value.code
  assert "settings.side: 32 -> 16" in exit.value.code
  assert "settings.bits: absent -> 10" in exit.value.code


def test_bare_tars_are_matched_by_key(tmp_path):
  names, folder = ["a.png", "b.png"], tmp_path / "photos"
  photos(folder, names)
  members = {name: (folder / name).read_bytes() for name in names}
  write_members(tmp_path / "x.tar", members)
  (tmp_path / "depth").mkdir()
  depth_file(tmp_path / "depth" / "b.png")
  assert not main(
    ["depth", f"--data={tmp_path}/x.tar", f"--output={tmp_path}/out",
     f"--depth_dir={tmp_path}/depth", "--inverse"]
  )  # fmt: skip
  label_set = LabelSet(tmp_path / "out", kind="depth")
  assert [label_set.read(0, i).key for i in range(2)] == ["a", "b"]
  assert [label_set.read(0, i).label is None for i in range(2)] == [True, False]


def test_no_match_names_the_first_record(tmp_path, capsys):
  shards_lib.write(photos(tmp_path / "photos", ["a.png"]), tmp_path / "base")
  (tmp_path / "depth").mkdir()
  argv = [
    "depth", f"--data={tmp_path}/base/*.tar", f"--output={tmp_path}/out",
    f"--depth_dir={tmp_path}/depth", "--metric",
  ]  # fmt: skip
  with pytest.raises(SystemExit) as exit:
    main(argv)
  output = exit.value.code
  assert "None of the 1 records has a label: 1 times 'depth: no file" in output
  assert "looked up as Item(key='000000000', name='a.png'" in output
  # The failed attempt does not block another one.
  depth_file(tmp_path / "depth" / "d_a.png")
  assert main([*argv, "--pattern=d_{stem}.png"]) == 0


def test_urls_are_names(tmp_path):
  class Urls(Source):
    def __getitem__(self, i):
      raise AssertionError("the metadata is enough")

    def read_metadata(self, i):
      url = "https://host/train2017/000000000009.jpg?size=large"
      return {"key": f"{i}", "url": url, "width": 4, "height": 3}

  items = list(annotations._read_items(Urls(), range(2)))
  assert [i.key for i in items] == ["0", "1"]
  assert items[0].name == "train2017/000000000009.jpg"
  assert items[0].stem == "000000000009"
  assert (items[0].height, items[0].width) == (3, 4)


# --- Real data ---------------------------------------------------------------


def test_coco_boxes_are_those_of_the_annotations(shared_data, tmp_path):
  coco = shared_data / "coco"
  file = coco / "annotations" / "instances_val2017.json"
  content = json.loads(file.read_text())
  listed = {image["file_name"]: image for image in content["images"]}
  names = sorted(listed)[:6]
  photos = {path.name for path in (coco / "val2017").iterdir()}
  captions = coco / "annotations" / "captions_val2017.json"
  read = listings.read(captions, images=coco / "val2017")
  examples = {example.name: example for example in read}
  examples = [examples[n] for n in names + sorted(photos - listed.keys())[:2]]
  # Resizing changes no coordinate.
  shards_lib.write(examples, tmp_path / "base", max_side=320)
  base = f"{tmp_path}/base/*.tar"
  assert not main(
    ["boxes", f"--data={base}", f"--output={tmp_path}/boxes", "--instances",
     str(file), str(file).replace("val", "train")]
  )  # fmt: skip
  labels = {"boxes": f"{tmp_path}/boxes"}
  source = build_source({"type": "webdataset", "path": base, "labels": labels})
  categories = {c["id"]: c["name"] for c in content["categories"]}
  total = 0
  for i, name in enumerate(names):
    image, rows = listed[name], content["annotations"]
    expected = [r for r in rows if r["image_id"] == image["id"]]
    expected = [r for r in expected if not r["iscrowd"]]
    x, y, w, h = np.array([a["bbox"] for a in expected]).T
    boxes = np.stack([y, x, y + h, x + w], 1)
    boxes /= np.array([image["height"], image["width"]] * 2)
    record = source[i]
    assert abs(record["boxes"] - boxes.clip(0, 1)).max() <= 1 / 65535
    assert record["phrases"] == [categories[a["category_id"]] for a in expected]
    total += len(expected)
  assert total > 20
  for i in (6, 7):
    assert "boxes" not in source[i]


def test_nyu_depth_is_larger_where_it_is_nearer(shared_data, tmp_path):
  nyu = shared_data / "nyuv2"
  lines = (nyu / "test.txt").read_text().splitlines()
  ids = [line.split()[0] for line in lines[:4]]
  examples = [
    listings.Example(f"{i}.jpg", nyu / "nyu_images" / f"{i}.jpg", ["a room"])
    for i in ids
  ]
  shards_lib.write(examples, tmp_path / "base")
  base = f"{tmp_path}/base/*.tar"
  assert not main(
    ["depth", f"--data={base}", f"--output={tmp_path}/depth",
     f"--depth_dir={nyu}/nyu_depths", "--metric", "--scale=25.5"]
  )  # fmt: skip
  label_set = LabelSet(tmp_path / "depth", kind="depth")
  for i, name in enumerate(ids):
    label = label_set.read(0, i).label
    file = str(nyu / "nyu_depths" / f"{name}.png")
    metres = cv2.imread(file, cv2.IMREAD_UNCHANGED) / 25.5
    side = (96, 96)
    means = cv2.resize(1 / metres, side, interpolation=cv2.INTER_AREA)
    error = abs(label.inverse_depth - means).max()
    assert error <= (label.high - label.low) / 1022
    near, far = (
      np.unravel_index(i, metres.shape)
      for i in (np.argmin(metres), np.argmax(metres))
    )
    near, far = (
      int(label.values[tuple(np.array(at) * 96 // metres.shape)])
      for at in (near, far)
    )
    assert near > 4 * far
    assert 0.09 < label.low < label.high < 1.5
