"""Detectors in ONNX files: FastestDet's rules, batches, errors."""

import dataclasses
import json
import math
import sys
import threading

import cv2
import jax
import numpy as np
import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.data import canvas
from mtv_jax.experts import onnx_detector
from mtv_jax.experts.base import Expert
from mtv_jax.experts.labelling.detections import Detections
from mtv_jax.parallel.mesh import make_mesh

NAMES = ("person", "dog", "cup")
# FastestDet's names of COCO's classes.
RENAMED = (
  "motorbike=motorcycle", "aeroplane=airplane", "sofa=couch",
  "pottedplant=potted plant", "diningtable=dining table", "tvmonitor=tv",
)  # fmt: skip


def grid(seed, classes=3, height=5, width=7):
  rng = np.random.default_rng(seed)
  sure = rng.uniform(0, 1, (1 + classes, height, width))
  where = rng.normal(0, 2, (4, height, width))
  return np.concatenate([sure[:1], where, sure[1:]]).astype(np.float32)


def cells(output, threshold):
  """The published rule, a cell at a time: (y0, x0, y1, x1, score, class)."""
  _, height, width = output.shape
  boxes = []
  for i in range(height):
    for j in range(width):
      cell = [float(x) for x in output[:, i, j]]
      score = cell[0] ** 0.6 * max(cell[5:]) ** 0.4
      if score <= threshold:
        continue
      x, y = (j + math.tanh(cell[1])) / width, (i + math.tanh(cell[2])) / height
      w, h = (1 / (1 + math.exp(-r)) for r in cell[3:5])
      box = (y - h / 2, x - w / 2, y + h / 2, x + w / 2)
      boxes.append((*box, score, cell[5:].index(max(cell[5:]))))
  return boxes


def published(output, threshold, height, width):
  """Detections in whole pixels, after suppression of overlaps above 45 %.

  Follows the detector's example: boxes are cut to whole pixels, and both
  ends count.
  """
  boxes = []
  for *box, score, kind in cells(output, threshold):
    sides = [height, width, height, width]
    pixels = [int(c * side) for c, side in zip(box, sides, strict=True)]
    boxes.append((*pixels, score, kind))
  best = []
  for box in sorted(boxes, key=lambda b: b[4], reverse=True):
    if all(overlap(box, other) <= 0.45 for other in best):
      best.append(box)
  return best


def overlap(a, b):
  """IoU in whole pixels, of which both ends count."""
  shared = math.prod(
    max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + 1) for k in (0, 1)
  )
  areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
  return shared / (sum(areas) - shared)


def test_fastestdet_is_decoded_cell_by_cell():
  def decode(threshold):
    return onnx_detector.FastestDet().decode(
      {"758": output}, NAMES, threshold=threshold, image_size=(1, 1)
    )

  for seed in range(4):
    output = grid(seed)
    got, want = decode(0.4), cells(output, 0.4)
    assert 5 < len(want) < 30
    np.testing.assert_allclose(got.boxes, [w[:4] for w in want], atol=1e-6)
    np.testing.assert_allclose(got.scores, [w[4] for w in want], rtol=1e-6)
    assert got.phrases == tuple(NAMES[w[5]] for w in want)
    assert got.boxes.dtype == got.scores.dtype == np.float32
  nothing = decode(1.0)
  assert nothing.boxes.shape == (0, 4) and nothing.phrases == ()


def test_images_go_in_as_published():
  image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
  got = onnx_detector.FastestDet().prepare(image, 32, 48)
  bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
  want = cv2.resize(bgr, (48, 32), interpolation=cv2.INTER_AREA) / 255
  np.testing.assert_array_equal(got, want.transpose(2, 0, 1).astype("float32"))


@dataclasses.dataclass
class Port:
  name: str
  shape: list
  type: str = "tensor(float)"


class Session:
  """Like onnxruntime's; its output is a grid, seeded by the image."""

  def __init__(self, batch=1, side=32, outputs=None, **port):
    self.input = Port(**{"name": "in", "shape": [batch, 3, side, side], **port})
    self.outputs = outputs or [Port("out", [batch, 8, 5, 7])]
    self.batches, self.lock = [], threading.Lock()

  def get_inputs(self):
    return [self.input]

  def get_outputs(self):
    return self.outputs

  def run(self, names, inputs):
    assert names == ["out"]
    with self.lock:
      self.batches.append(len(inputs["in"]))
    seeds = np.rint(inputs["in"][:, 0, 0, 0] * 255).astype(int)
    return [np.stack([grid(seed) for seed in seeds])]


@pytest.fixture
def build(tmp_path, monkeypatch):
  """Opens a session as a file's."""
  file, names_file = tmp_path / "a.onnx", tmp_path / "names.txt"
  file.write_bytes(b"a model")
  mesh = make_mesh({"data": 1}, jax.devices()[:1])

  def build(session, *, batch_size=4, names=NAMES, **options):
    names_file.write_text("\n".join(names))
    monkeypatch.setattr(onnx_detector, "_open_session", lambda _: session)
    options = dict(mesh=mesh, batch_size=batch_size, threshold=0.4) | options
    return onnx_detector.load_expert(file, names=names_file, **options)

  return build


def image_of(seed):
  return np.full((40, 60, 3), seed, np.uint8)


def inside(box):
  y, x = (min(box[k + 2], 1) - max(box[k], 0) for k in (0, 1))
  return y * x >= (box[2] - box[0]) * (box[3] - box[1]) / 2


@pytest.mark.parametrize(
  ("batch", "rows", "wanted"), [(1, 4, 1), (3, 4, 3), ("n", 4, 1)]
)
def test_rows_are_the_files_batches(build, batch, rows, wanted):
  session = Session(batch)
  expert = build(session, batch_size=rows)
  assert isinstance(expert, Expert)
  assert expert.rows == 6 if batch == 3 else 4
  prepared = [expert.prepare(image_of(i), {}) for i in range(expert.rows)]
  out = expert.run({"image": np.stack([p.arrays["image"] for p in prepared])})
  assert session.batches == [wanted] * (expert.rows // wanted)
  for i, each in enumerate(prepared):
    np.testing.assert_array_equal(out["out"][i], grid(i))
    label = expert.finish({"out": out["out"][i]}, each.meta).label
    # Boxes mostly outside of the image are dropped.
    *box, _, kind = max(filter(inside, cells(grid(i), 0.4)), key=lambda f: f[4])
    assert label.phrases[0] == NAMES[kind]
    np.testing.assert_allclose(label.boxes[0], np.clip(box, 0, 1), atol=1e-6)
    assert (np.diff(label.scores) <= 0).all()
  json.dumps(expert.settings)


TWO_OUTPUTS = [Port("a", [1, 8, 5, 7]), Port("b", [1, 4])]


@pytest.mark.parametrize(
  ("session", "changes", "message"),
  [
    (Session(side="h"), {}, "any size.*size="),
    (Session(), {"size": 64}, r"size=64.*\(32, 32\) only"),
    (Session(), {"names": ["one"]}, "3 classes.*1 names"),
    (Session(outputs=[Port("a", [1, 9, 9])]), {}, r"a: \[1, 9, 9\].*decoder"),
    (Session(outputs=TWO_OUTPUTS), {}, "FastestDet has one output"),
    (Session(type="tensor(uint8)"), {}, r"uint8.*\[1, 3, 32, 32\]"),
    (Session(shape=[1, 1, 32, 32]), {}, "3 channels"),
    (Session(), {"dtype": "bfloat16"}, "dtype"),
    (Session(), {"threshold": 65.0}, "threshold is 65.0, expected a number"),
    (Session(), {"decoder": "fastestdat"}, "Did you mean 'fastestdet'"),
    (Session(), {"decoder": f"{__name__}:Corners"}, "DetectionDecoder"),
  ],
)
def test_files_of_other_models(build, session, changes, message):
  with pytest.raises(ValueError, match=message):
    build(session, **changes)


def test_files_that_leave_the_size_open(build):
  expert = build(Session(side="side"), size=(20, 40))
  assert expert.prepare(image_of(0), {}).arrays["image"].shape == (3, 20, 40)


class Corners:
  """A user's decoder: rows of (x0, y0, x1, y1, score), in pixels."""

  name, threshold, nms = "corners", 0.5, 0.5

  def check(self, outputs, classes):
    del outputs, classes

  def prepare(self, image, height, width):
    return np.zeros((3, height, width), np.float32)

  def decode(self, outputs, names, *, threshold, image_size):
    rows = outputs["boxes"]
    rows = rows[rows[:, 4] > threshold]
    boxes = np.float32(rows[:, [1, 0, 3, 2]] / (image_size * 2))
    return Detections(boxes, rows[:, 4], (names[0],) * len(rows))


corners = Corners()


def test_a_decoder_by_module_and_name(build):
  session = Session(outputs=[Port("boxes", ["n", 5])])
  expert = build(session, decoder=f"{__name__}:corners", names=["thing"])
  rows = np.array([[6, 4, 30, 20, 0.9], [0, 0, 9, 9, 0.3]], np.float32)
  label = expert.finish({"boxes": rows}, (40, 60)).label
  np.testing.assert_allclose(label.boxes, [[0.1, 0.1, 0.5, 0.5]], atol=1e-6)
  assert label.phrases == ("thing",)


def test_files_and_packages_that_are_missing(tmp_path, monkeypatch):
  model, names = tmp_path / "a.onnx", tmp_path / "names.txt"
  with pytest.raises(FileNotFoundError, match=r"a\.onnx"):
    onnx_detector.load_expert(model, names=names)
  model.write_bytes(b"no model")
  monkeypatch.setitem(sys.modules, "onnxruntime", None)
  with pytest.raises(ImportError, match=r"mtv_jax\[onnx\]"):
    onnx_detector.load_expert(model, names=names)


def test_names_begin_after_a_byte_order_mark(build, tmp_path):
  wanted = build(Session()).settings["names_hash"]
  model, names = tmp_path / "a.onnx", tmp_path / "names.txt"
  names.write_text("\ufeff" + "\r\n".join(NAMES) + "\r\n", encoding="utf-8")
  expert = onnx_detector.load_expert(model, names=names)
  assert expert.settings["names_hash"] == wanted
  for content, message in (
    (b"caf\xe9\n", r"names\.txt is not UTF-8 text"),
    (b"person\n\ndog\n", "line 2 is blank"),
  ):
    names.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      onnx_detector.load_expert(model, names=names)


@pytest.fixture(scope="module")
def detector(shared_data):
  folder = shared_data / "weights_fastestdet"
  return onnx_detector.load_expert(
    folder / "FastestDet.onnx", names=folder / "coco.names"
  )


@pytest.mark.reference
def test_broken_files_say_so(tmp_path, shared_data):
  model, names = tmp_path / "a.onnx", tmp_path / "names.txt"
  model.write_bytes(b"no model")
  names.write_text("person\ndog\n")
  with pytest.raises(ValueError, match=r"a\.onnx: onnxruntime can't open it"):
    onnx_detector.load_expert(model, names=names)
  real = shared_data / "weights_fastestdet" / "FastestDet.onnx"
  with pytest.raises(ValueError, match="80 classes.*2 names"):
    onnx_detector.load_expert(real, names=names)


@pytest.mark.reference
def test_detections_on_photos_are_the_published_ones(detector, shared_data):
  """Matches onnxruntime and OpenCV on the same file, as published.

  Boxes above the threshold are equal. After suppression they may differ if an
  overlap is near 45 %: the published code rounds to whole pixels and includes
  the part of a box outside the photo, which ours leaves out.
  """
  import onnxruntime

  session = onnxruntime.InferenceSession(
    str(shared_data / "weights_fastestdet" / "FastestDet.onnx"),
    providers=["CPUExecutionProvider"],
  )
  differ, boxes = 0, 0
  for file in sorted((shared_data / "coco").glob("*2017/*.jpg"))[::3]:
    image = cv2.imread(str(file))
    height, width = image.shape[:2]
    small = cv2.resize(image, (352, 352), interpolation=cv2.INTER_AREA)
    pixels = (small.transpose(2, 0, 1)[None] / 255).astype(np.float32)
    ((output,),) = session.run([], {session.get_inputs()[0].name: pixels})
    prepared = detector.prepare(canvas.decode(file.read_bytes()), {})
    np.testing.assert_array_equal(prepared.arrays["image"], pixels[0])
    mine = detector.run({"image": prepared.arrays["image"][None]})
    row = {name: value[0] for name, value in mine.items()}
    # Several threads may sum in a different order.
    np.testing.assert_allclose(row["758"], output, rtol=1e-4, atol=1e-5)
    label = detector.finish(row, prepared.meta).label
    want = published(output, 0.65, height, width)
    boxes += len(want)
    inside = np.array([w[:4] for w in want]).reshape(-1, 4)
    sides = np.array([height, width] * 2)
    got = np.trunc(label.boxes.astype(np.float64) * sides)
    if len(got) == len(want):
      # One pixel: a coordinate on the border of two may round to either.
      far = abs(got - inside.clip(0, sides)).max(initial=0)
      assert far <= 1, file.name
      np.testing.assert_allclose(label.scores, [w[4] for w in want], rtol=1e-4)
      continue
    differ += 1
    # Only boxes near an IoU of 45 % differ.
    for one in want:
      distance = abs(got - np.clip(one[:4], 0, sides)).max(axis=1)
      nearest = max(overlap(one, other) for other in want if other is not one)
      assert distance.min() <= 1 or nearest > 0.4, file.name
  assert boxes > 250
  assert differ <= 2


@pytest.mark.reference
def test_the_rate_on_coco_is_the_published_codes(shared_data, tmp_path):
  """The whole chain of tools against the published rules, on real photos."""
  coco, weights = shared_data / "coco", shared_data / "weights_fastestdet"
  parts = ("train2017", "val2017")
  shards, truth = tmp_path / "shards", tmp_path / "truth"
  captions = [str(coco / f"annotations/captions_{p}.json") for p in parts]
  images = [str(coco / p) for p in parts]
  argv = [*captions, "--images", *images, f"--output={shards}"]
  assert not run_command("make_shards", argv)
  instances = [str(coco / f"annotations/instances_{p}.json") for p in parts]
  data = f"--data={shards}/*.tar"
  argv = ["boxes", data, f"--output={truth}", "--instances", *instances]
  assert not run_command("make_labels", argv)
  argv = ["--expert=boxes", f"--weights={weights / 'FastestDet.onnx'}", data]
  argv += [f"--names={weights / 'coco.names'}", "--batch_size=2"]
  assert not run_command("label", [*argv, f"--output={tmp_path / 'boxes'}"])
  figures = tmp_path / "figures.json"
  argv = [f"--labels={tmp_path / 'boxes'}", f"--truth={truth}"]
  argv += [f"--json={figures}", "--rename", *RENAMED]
  run_command("match_boxes", argv)
  ours = json.loads(figures.read_text())
  # By the published rules (`published`), 408 of 633 boxes match.
  assert ours["truth"] == 2068
  assert abs(ours["boxes"] - 633) <= 2
  assert ours["recall"] >= 408 / 2068 - 0.002
  assert ours["precision"] >= 408 / 633 - 0.002
