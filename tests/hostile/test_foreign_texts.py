"""Hostile prompts, answers to questions, and foreign detectors."""

import importlib.util
import types

import numpy as np
import pytest
from hostile import foreign_samples as samples
from hostile.harness import Cases

from mtv_jax.evals import vqa
from mtv_jax.evals.core import prompts
from mtv_jax.experts.labelling.phrases import build_phrases
from mtv_jax.experts.onnx import detector

PROMPTS = Cases(__file__, "prompts and names")
ANSWERS = Cases(__file__, "answers to questions")
DETECTORS = Cases(__file__, "ONNX detectors")

HUGE = 10**400


def _prompts(content, name="a.json"):
  return lambda folder: prompts.read_prompts(
    samples.write(folder, name, content)
  )


PROMPTS.add("valid", _prompts({"classes": ["a"]}), expects="used")
for _label, _content in {
  **samples.BROKEN,
  "without classes": {"templates": ["{}"]},
  "no class": {"classes": []},
  "classes of text": {"classes": "cat"},
  "classes of numbers": {"classes": [1]},
  "a blank class": {"classes": [""]},
  "templates of an object": {"classes": ["a"], "templates": {"a": 1}},
  "a template without a name": {"classes": ["a"], "templates": ["x"]},
  "a template of two names": {"classes": ["a"], "templates": ["{} {}"]},
  "no template": {"classes": ["a"], "templates": [""]},
  "ids of numbers": {"classes": ["a"], "ids": [1]},
  "too many ids": {"classes": ["a"], "ids": ["a", "b"]},
  "repeated ids": {"classes": ["a", "b"], "ids": ["a", "a"]},
}.items():
  PROMPTS.add(_label, _prompts(_content))
for _label, _data in {
  "empty": b"",
  "blank": b" \n \n",
  "Latin-1": b"caf\xe9",
}.items():
  PROMPTS.add(f"a list: {_label}", _prompts(_data, "a.txt"))
  PROMPTS.add(
    f"phrases: {_label}",
    lambda folder, d=_data: build_phrases(
      str(samples.write(folder, "a.txt", d))
    ),
  )
PROMPTS.add(
  "a missing file", lambda folder: prompts.read_prompts(folder / "a.json")
)


@PROMPTS.add("an empty folder")
def _empty_prompts(folder):
  (folder / "a").mkdir()
  prompts.read_prompts(folder / "a")


@PROMPTS.parametrize
def test_prompts(case, hostile):
  hostile(case)


# ---------------------------------------------------------------------------
# Answers and truths.


def _answers(content):
  return lambda folder: vqa.read_answers(samples.write(folder, "a", content))


def _truths(content):
  return lambda folder: vqa.read_questions(samples.write(folder, "a", content))


ANSWERS.add("valid", _answers([{"id": 1, "answer": "a"}]), expects="used")
for _label, _row in {
  "null": {"id": 1, "answer": None},
  "a list": {"id": 1, "answer": ["a"]},
  "an object": {"id": 1, "answer": {"a": 1}},
  "of a question of null": {"id": None, "answer": "a"},
  "of a question of a list": {"id": [1], "answer": "a"},
  "missing": {"id": 1},
  "of no question": {"answer": "a"},
}.items():
  ANSWERS.add(f"an answer {_label}", _answers([_row]))
for _label, _row in {
  "null": {"id": 1, "answer": None},
  "no truth": {"id": 1, "answers": []},
  "truths of objects": {"id": 1, "answers": [{"x": 1}]},
  "truths of lists": {"id": 1, "answers": [["a"]]},
  "truths of an object": {"id": 1, "answers": {"a": 1}},
  "truths of null": {"id": 1, "answers": [{"answer": None}]},
  "options of text": {"id": 1, "answer": 0, "options": "ab"},
  "options of a number": {"id": 1, "answer": 0, "options": 3},
  "options of objects": {"id": 1, "answer": 0, "options": [{"a": 1}]},
  "an option beyond": {"id": 1, "answer": 9, "options": ["a"]},
  "an option before": {"id": 1, "answer": -1, "options": ["a"]},
  "a vast option": {"id": 1, "answer": HUGE // 10**9, "options": ["a"]},
  "a kind of a list": {"id": 1, "answer": "a", "answer_type": ["x"]},
}.items():
  ANSWERS.add(f"a truth: {_label}", _truths([_row]))
_TWICE = [{"id": 1, "answer": "a"}, {"id": "1", "answer": "b"}]
ANSWERS.add("a question twice", _answers(_TWICE), match="twice")
for _label, _data in {**samples.BROKEN, "an empty list": b"[]"}.items():
  ANSWERS.add(f"answers: {_label}", _answers(_data))
  ANSWERS.add(f"truths: {_label}", _truths(_data))
ANSWERS.add("a missing file", lambda folder: vqa.read_answers(folder / "a"))


@ANSWERS.parametrize
def test_answers(case, hostile):
  hostile(case)


# ---------------------------------------------------------------------------
# Detectors.


def _shapes(shape, kind="tensor(float)", size=None):
  """The input of a session, which onnxruntime gives as names and numbers."""

  def run(folder):
    node = types.SimpleNamespace(name="image", type=kind, shape=shape)
    session = types.SimpleNamespace(get_inputs=lambda: [node])
    return list(detector._read_input(session, size))

  return run


DETECTORS.add("a valid input", _shapes(["n", 3, 8, 8]), expects="used")
for _label, _arguments in {
  "a side of 0": (["n", 3, 0, 8],),
  "a negative side": (["n", 3, -8, 8],),
  "a vast side": (["n", 3, 1 << 40, 8],),
  "a batch of 0": ([0, 3, 8, 8],),
  "one channel": ([1, 1, 8, 8],),
  "three axes": ([3, 8, 8],),
  "integers": ([1, 3, 8, 8], "tensor(int32)"),
  "an open side": (["n", 3, "h", "w"],),
  "a size of 0": (["n", 3, "h", "w"], "tensor(float)", 0),
  "a vast size": (["n", 3, "h", "w"], "tensor(float)", 1 << 40),
  "another size": (["n", 3, 8, 8], "tensor(float)", 16),
}.items():
  DETECTORS.add(f"an input of {_label}", _shapes(*_arguments))


def _onnx(data=None, *, shape=(1, 3, 8, 8), kind=1, names=b"a\n", classes=1):
  """A detector in a file of the real format."""

  def run(folder):
    content = data
    if content is None:
      from onnx import helper

      make = helper.make_tensor_value_info
      value = np.zeros((1, 5 + classes, 2, 2), np.float32)
      constant = helper.make_tensor("c", 1, value.shape, value.ravel())
      node = helper.make_node("Constant", [], ["out"], value=constant)
      graph = helper.make_graph(
        [node],
        "g",
        [make("in", kind, shape)],
        [make("out", 1, [1, 5 + classes, 2, 2])],
      )
      opset = [helper.make_opsetid("", 13)]
      model = helper.make_model(graph, ir_version=8, opset_imports=opset)
      content = model.SerializeToString()
    path = samples.write(folder, "a.onnx", content)
    listed = samples.write(folder, "names.txt", names)
    return detector.OnnxDetector(path, names=listed)

  return run


FILES = Cases(__file__, "ONNX files")
FILES.add("valid", _onnx(), expects="used")
for _label, _options in {
  "empty": {"data": b""},
  "text": {"data": b"hello"},
  "binary": {"data": bytes(range(256)) * 40},
  "a length of 2^60": {"data": b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x0f"},
  "integers": {"kind": 6},
  "a side of 0": {"shape": (1, 3, 0, 8)},
  "an open side": {"shape": (1, 3, None, 8)},
  "one axis": {"shape": (3,)},
  "too many classes": {"classes": 7},
  "no class": {"classes": 0},
  "no names": {"names": b""},
  "names of Latin-1": {"names": b"caf\xe9\n"},
  "a blank name": {"names": b"a\n\nb\n"},
}.items():
  FILES.add(_label, _onnx(**_options))


@DETECTORS.parametrize
def test_detectors(case, hostile):
  hostile(case)


@pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))),
  reason="onnx and onnxruntime are not installed",
)
@FILES.parametrize
def test_onnx_files(case, hostile):
  hostile(case)
