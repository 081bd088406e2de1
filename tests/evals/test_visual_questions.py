"""Visual questions: files of benchmarks, controls, resume, sheets."""

import dataclasses
import json

import numpy as np
import pytest
from colour_encoder import COLOURS
from dataset_samples import write_jpeg, write_json

from mtv_jax.cli.main import run_command
from mtv_jax.data.scenes.questions import KINDS, conversation
from mtv_jax.encoder import baselines
from mtv_jax.encoder.visual_language import VisualLanguageModel
from mtv_jax.evals import visual_questions, vqa
from mtv_jax.evals.core import bootstrap, global_features
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.feature_cache import FeatureFolder
from mtv_jax.evals.datasets import questions, registry
from mtv_jax.evals.visual_questions import VisualQuestions
from mtv_jax.utils.errors import InputError, MissingFileError

NAMES = ["red", "green", "blue", "white"]


class ColourModel(VisualLanguageModel):
  """Names the colour of an image; "red" without one."""

  def __init__(self, *, fail_at=None):
    self.encoder = baselines.PixelEncoder(16, 8)
    self.calls, self.fail_at = [], fail_at

  def _call(self, name, count):
    if len(self.calls) == self.fail_at:
      raise KeyboardInterrupt
    self.calls.append((name, count))

  def encode(self, images, *, batch_size=64):
    self._call("encode", len(images))
    rows = [np.mean(images[i], axis=(0, 1)) for i in range(len(images))]
    return np.array(rows, np.float32)[:, None]

  def answer(
    self, asked, features=None, *, images=None, max_tokens=16, batch_size=64
  ):
    self._call("answer", len(asked))
    if features is None:
      return ["red"] * len(asked)
    table = np.array(list(COLOURS.values()))
    distance = np.abs(features[images] - table).sum(axis=2)
    return [list(COLOURS)[i] for i in distance.argmin(axis=1)]

  def protocol(self):
    return {"model": "colours"}


@pytest.fixture
def asked(tmp_path, write_image):
  """Nine questions about six images, in LLaVA's JSON."""
  rows = []
  for i in range(6):
    colour = NAMES[i % 4]
    write_image(tmp_path / "data" / f"{i}.png", colour)
    for kind in ("first", "second")[: 1 + i % 2]:
      text = "what colour is it?"
      row = {"id": f"{i}-{kind}", "image": f"{i}.png", "answer_type": kind}
      rows.append(conversation([(text, colour)], **row))
  # Questions about text alone are left out.
  rows.append({"conversations": rows[0]["conversations"]})
  return write_json(tmp_path / "data" / "questions.json", rows)


def evaluate(monkeypatch, asked, answerer=None, folder=None, **options):
  answerer = answerer or ColourModel()
  monkeypatch.setattr(VisualLanguageModel, "load", lambda *_, **__: answerer)
  encoder = baselines.PixelEncoder(16, 8)
  if folder:
    global_features.share_features(encoder, [], FeatureFolder(folder, 10**6))
  options = {"data": str(asked), "model": "run", "batch_size": 2, **options}
  return VisualQuestions(**options).run(encoder)


def test_scores_and_controls(monkeypatch, asked, tmp_path):
  file = tmp_path / "answers.jsonl"
  result = evaluate(monkeypatch, asked, answers=str(file), pictures=3)
  assert result.metrics == {
    "accuracy": 1,
    "accuracy_first": 1,
    "accuracy_second": 1,
    "accuracy_blank": pytest.approx(2 / 9),
    "accuracy_shuffled": 0,
  }
  # "red" for the first type, "green" for the second.
  assert result.chance["accuracy"] == pytest.approx((2 + 2) / 9)
  assert result.errors.keys() == result.metrics.keys()
  assert json.loads(json.dumps(result.protocol))["questions"] == 9
  assert result.sheets["answers"].shape[1] <= visual_questions.plots.SHEET_WIDTH
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  want = {"question_id": "0-first", "prompt": "what colour is it?"}
  assert rows[0] == {**want, "text": "red"}
  assert vqa.read_answers(file).keys() == {row["question_id"] for row in rows}
  for name in (str(tmp_path), "no/such/a.jsonl", "gs://a/b", str(asked)):
    with pytest.raises(InputError, match="answers:"):
      evaluate(monkeypatch, asked, answers=name)
  result = evaluate(monkeypatch, asked, count=1)
  assert "accuracy_shuffled" not in result.metrics
  # VQA's result format; ids of digits are integers.
  keys = ("7", "07", "random-1")
  rows = json.loads(
    visual_questions.format_answers(keys, "???", "abc", "a.json")
  )
  assert [row["question_id"] for row in rows] == [7, *keys[1:]]
  assert rows[1] == {"question_id": "07", "answer": "b"}


def test_killed_at_any_moment(monkeypatch, asked, tmp_path):
  monkeypatch.setattr(visual_questions, "_SPAN_BYTES", 24)  # Two images.
  monkeypatch.setattr(bootstrap, "RESAMPLES", 4)
  model = ColourModel()
  whole = evaluate(monkeypatch, asked, model, tmp_path / "whole")
  # A forward pass for the size; three spans, encoded once, answered thrice.
  assert len(model.calls) == 1 + 3 * 4
  for moment in range(len(model.calls)):
    folder, again = tmp_path / str(moment), ColourModel()
    with pytest.raises(KeyboardInterrupt):
      evaluate(monkeypatch, asked, ColourModel(fail_at=moment), folder)
    result = evaluate(monkeypatch, asked, again, folder)
    assert result.to_dict() == whole.to_dict()
    # Only the first pass is repeated.
    assert len(again.calls) == len(model.calls) - moment + (moment > 0)
  for file in (tmp_path / "whole" / "answers").glob("*/0-2.json"):
    file.write_text(file.read_text()[:-3])
  result = evaluate(monkeypatch, asked, folder=tmp_path / "whole")
  assert result.to_dict() == whole.to_dict()
  file.unlink()
  file.mkdir()
  with pytest.raises(InputError, match="is not a file of answers"):
    evaluate(monkeypatch, asked, folder=tmp_path / "whole")


def test_language_model_of_another_encoder(monkeypatch, asked):
  with pytest.raises(NotApplicable, match="set model=RUN"):
    evaluate(monkeypatch, asked, model=None)
  other = ColourModel()
  other.encoder.params = {"image": {"w": np.ones(2, np.float32)}}
  with pytest.raises(NotApplicable, match="trained on another encoder"):
    evaluate(monkeypatch, asked, other)


def write_benchmark(root, kind):
  """Two questions in a benchmark's layout; returns the names of its images."""
  if kind == "VQAv2":
    asked = [
      {"question_id": i, "image_id": 7 + i, "question": "Is it so?"}
      for i in range(2)
    ]
    yes = [{"answer": "yes"}] * 10
    truths = [
      {"question_id": i, "answer_type": "yes/no", "answers": yes}
      for i in (1, 0)
    ]
    content = {"questions": asked, "data_subtype": "val2014"}
    write_json(root / "v2_OpenEnded_mscoco_val2014_questions.json", content)
    file = root / "v2_mscoco_val2014_annotations.json"
    write_json(file, {"annotations": truths})
    return [f"val2014/COCO_val2014_{7 + i:012d}.jpg" for i in range(2)]
  if kind == "GQA":
    row = {"question": "Is it so?", "answer": "yes"}
    types = {"types": {"structural": "verify"}}
    rows = {f"0{i}": {**row, **types, "imageId": f"n{i}"} for i in range(2)}
    write_json(root / "testdev_balanced_questions.json", rows)
    return [f"images/n{i}.jpg" for i in range(2)]
  if kind == "TextVQA":
    row = {"question": "Is it so?", "answers": ["yes"] * 10}
    rows = [{**row, "question_id": i, "image_id": f"a{i}"} for i in range(2)]
    write_json(root / "TextVQA_0.5.1_val.json", {"data": rows})
    return [f"train_images/a{i}.jpg" for i in range(2)]
  if kind == "POPE":
    for name in ("random", "popular"):
      row = {"question_id": 1, "text": "Is it so?", "label": "yes"}
      row["image"] = f"COCO_val2014_{name}.jpg"
      write_json(root / f"coco_pope_{name}.json", row)
    return [f"val2014/COCO_val2014_{n}.jpg" for n in ("popular", "random")]
  row = {"question": "Is it so?", "choices": ["no", "yes"], "answer": 1}
  rows = {str(i): {**row, "hint": "", "image": "image.png"} for i in (3, 4, 5)}
  rows["5"]["image"] = None
  write_json(root / "problems.json", rows)
  write_json(root / "pid_splits.json", {"test": ["3", "4", "5"], "train": []})
  return ["test/3/image.png", "test/4/image.png"]


@pytest.mark.parametrize(
  ("kind", "rule", "name", "answer"),
  [
    ("VQAv2", "vqa", "accuracy_yes/no", "yes"),
    ("GQA", "exact", "accuracy_verify", "Yes."),
    ("TextVQA", "textvqa", "accuracy", "Yes"),
    ("POPE", "pope", "f1_random", "Yes, it is."),
    ("ScienceQA", "option", "accuracy", "B"),
  ],
)
def test_files_of_benchmarks(tmp_path, write_image, kind, rule, name, answer):
  images = write_benchmark(tmp_path, kind)
  with pytest.raises(MissingFileError, match="are not beside it"):
    registry.open_questions(str(tmp_path), split="test")
  for file in images:
    write_jpeg(write_image, tmp_path / file, "red")
  data = registry.open_questions(str(tmp_path), split="test")
  assert len(data.images) == len(data.texts) == len({*data.keys}) == 2
  assert data.images[1].shape == (8, 12, 3)
  assert data.rule == rule and data.owner.tolist() == [0, 1]
  assert data.prompt == (questions.LETTER if "B" in answer else questions.SHORT)
  assert "Is it so?" in data.texts[0]
  assert kind != "ScienceQA" or data.texts[0].endswith("\nA. no\nB. yes")
  estimate = vqa.estimate_scores(
    rule, [answer, "no"], data.truths, groups=data.owner
  )
  assert estimate.metrics["accuracy"] == 0.5
  assert name in estimate.metrics
  if kind == "POPE":  # The ids of a single file are its own.
    file = str(tmp_path / "coco_pope_random.json")
    assert registry.open_questions(file, split="test").keys == ("1",)
    assert data.keys == ("popular-1", "random-1")
    with pytest.raises(SystemExit, match="is a benchmark"):
      run_command("make_questions", [f"--data={file}", "--output=copy"])
  one = registry.open_questions(str(tmp_path), split="test", count=1)
  assert len(one.images) == 1 and one.digest != data.digest


def test_test_sets_have_no_truths(monkeypatch, tmp_path, write_image):
  write_benchmark(tmp_path, "VQAv2")
  old = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
  content = json.loads(old.read_text()) | {"data_subtype": "test-dev2015"}
  new = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
  write_json(tmp_path / new, content)
  for i in (7, 8):
    file = tmp_path / "test2015" / f"COCO_test2015_{i:012d}.jpg"
    write_jpeg(write_image, file, "blue")
  with pytest.raises(InputError, match="Set answers=FILE"):
    evaluate(monkeypatch, tmp_path / new)
  out = tmp_path / "answers.jsonl"
  result = evaluate(monkeypatch, tmp_path / new, answers=str(out), pictures=1)
  assert not result.metrics and vqa.read_answers(out) == {
    "0": "blue",
    "1": "blue",
  }
  (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
  with pytest.raises(MissingFileError, match="its answers"):
    registry.open_questions(str(old), split="test")


def test_malformed_files(tmp_path, asked):
  good = json.loads(asked.read_text())
  more = [dict({"from": "human"}, value="b"), dict({"from": "gpt"}, value="c")]
  for change, message in (
    ({"conversations": []}, "record 0: it has 0 turns; expected pairs"),
    ({"conversations": good[0]["conversations"] + more}, "several questions"),
    ({"image": 3}, "record 0: image"),
    ({"image": "../x.png"}, "without '..'"),
  ):
    write_json(asked, [{**good[0], **change}])
    with pytest.raises(InputError, match=message):
      registry.open_questions(str(asked), split="test")
  write_json(asked, [good[0], good[0]])
  with pytest.raises(InputError, match="question '0-first' occurs twice"):
    registry.open_questions(str(asked), split="test")
  lines = asked.with_suffix(".jsonl")
  lines.write_text("\n".join(map(json.dumps, good)))
  assert len(registry.open_questions(str(lines), split="test").texts) == 9
  write_benchmark(tmp_path, "ScienceQA")
  write_json(tmp_path / "pid_splits.json", {"test": ["9"]})
  for change, message in (
    ({}, "lacks the problem 9"),
    ({"9": 3}, "a question is 3; expected an object"),
    ({"9": {"question": "a"}}, "has no 'choices'"),
  ):
    write_json(tmp_path / "problems.json", change)
    with pytest.raises(InputError, match=message):
      registry.open_questions(str(tmp_path / "problems.json"), split="test")


@pytest.mark.parametrize(
  ("name", "edit", "message"),
  [
    ("TextVQA_0.5.1_val", lambda x: x["data"][1].update(answers=[]), "'1' has"),
    ("problems", lambda x: x["3"].update(subject=[1]), "rename"),
    ("problems", lambda x: x["3"].update(subject="a_blank"), "rename"),
    ("problems", lambda x: x["3"].update(choices=["a"] * 27), "than letters"),
    ("questions", lambda x: x[1].update(answer_type="semantic"), "rename"),
  ],
)
def test_refused_questions(asked, name, edit, message):
  file = asked.with_name(f"{name}.json")
  write_benchmark(asked.parent, name.partition("_0")[0])
  content = json.loads(file.read_text())
  edit(content)
  write_json(file, content)
  with pytest.raises(InputError, match=message):
    registry.open_questions(str(file), split="test")


def test_questions_about_boxes():
  """Their answers follow from the boxes; texts are balanced."""
  boxes = registry.open_boxes("scenes", count=25)
  data = questions.from_boxes(boxes)
  counts = {}
  for key, text, truth in zip(data.keys, data.texts, data.truths, strict=True):
    image, (answer,) = int(key.split("-")[1]), truth.truths
    (named, *_) = [p for p in boxes.phrases[image] if f" {p} " in text]
    if truth.kind == "which":
      assert answer == named
      continue
    counts.setdefault((truth.kind, named), []).append(answer)
    y0, x0, y1, x1 = boxes.boxes[image][boxes.phrases[image].index(named)]
    is_second = (x0 + x1) / 2 > 0.5
    if truth.kind == "how_large":
      is_second = (y1 - y0) * (x1 - x0) > 0.25
    assert is_second == (answer in ("right", "yes"))
  assert len(counts) and all(len({*a}) == 2 for a in counts.values())
  assert data.images[0].shape == (96, 96, 3)
  # A class with a dropped box (a crowd) is neither single nor absent.
  every = tuple({p for row in boxes.phrases for p in row})
  crowds = dataclasses.replace(boxes, dropped=(every,) * len(boxes.images))
  with pytest.raises(InputError, match="no balanced questions"):
    questions.from_boxes(crowds)


def test_written_questions(tmp_path, capsys):
  scenes = {"type": "scenes", "first": 1_000_005, "size": 32}
  options = ["--size=32", "--split=test", f"--output={tmp_path}"]
  with pytest.raises(SystemExit, match="change --first or --count"):
    run_command("make_questions", [*options, "--first=999_950"])
  options += ["--count=60", "--first=5"]
  assert run_command("make_questions", options) == 0
  written = registry.open_questions(str(tmp_path), split="test")
  asked = registry.open_questions(scenes, split="test", count=60)
  assert written.keys == asked.keys and written.texts == asked.texts
  assert written.truths == asked.truths and written.unions == asked.unions
  pairs = zip(written.images, asked.images, strict=True)
  assert all(np.array_equal(a, b) for a, b in pairs)
  assert f"wrote {len(asked.keys)} questions" in capsys.readouterr().out
  with pytest.raises(SystemExit, match="name another --output"):
    run_command("make_questions", options)
  merged = [option for option in options if "output" not in option]
  merged += [f"--output={tmp_path}/merged", "--merge"]
  assert run_command("make_questions", merged) == 0
  rows = json.loads((tmp_path / "merged" / "questions.json").read_text())
  assert len(rows) == len(asked.images)
  pairs = []
  for row in rows:
    first, *others = (turn["value"] for turn in row["conversations"])
    assert first.startswith("<image>\n") and "<image>" not in f"{others}"
    texts = [first.removeprefix("<image>\n"), *others]
    pairs += zip(texts[::2], texts[1::2], strict=True)
  answers = [truth.truths[0] for truth in asked.truths]
  assert sorted(pairs) == sorted(zip(asked.texts, answers, strict=True))
  kinds = [o for o in options if "output" not in o] + ["--kinds", "spatial"]
  with pytest.raises(
    SystemExit, match=r"\['sizes'\]: expected some of \['colour'"
  ):
    run_command("make_questions", [*kinds, "sizes", f"--output={tmp_path}/x"])
  run_command("make_questions", [*kinds, f"--output={tmp_path}/spatial"])
  run_command("make_questions", [*kinds, f"--output={tmp_path}/s", "--merge"])
  merged = json.loads((tmp_path / "s" / "questions.json").read_text())
  some = registry.open_questions(f"{tmp_path}/spatial", split="test")
  rows = zip(asked.keys, asked.truths, strict=True)
  spatial = {k: t for k, t in rows if t.kind in KINDS["spatial"]}
  assert dict(zip(some.keys, some.truths, strict=True)) == spatial
  assert 0 < len(some.images) < len(asked.images)
  assert len(spatial) == sum(len(row["conversations"]) // 2 for row in merged)
