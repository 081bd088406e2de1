"""Hostile prompts, answers to questions, and foreign detectors."""

import importlib.util
import types

import numpy as np
from hostile import foreign_samples as samples
from hostile.harness import Cases, run_all
from hostile.samples import BROKEN_JSON, changed

from mtv_jax.evals import vqa
from mtv_jax.evals.core import prompts
from mtv_jax.experts import onnx_detector as detector
from mtv_jax.experts.labelling.phrases import build_phrases

PROMPTS = Cases(__file__, "prompts and names")
ANSWERS = Cases(__file__, "answers to questions")
DETECTORS = Cases(__file__, "ONNX detectors")
FILES = Cases(__file__, "ONNX files")


def _read_prompts(folder, content):
  return prompts.read_prompts(samples.write(folder, "a.json", content))


def _read_list(folder, content):
  return prompts.read_prompts(samples.write(folder, "a.txt", content))


def _read_phrases(folder, content):
  return build_phrases(str(samples.write(folder, "a.txt", content)))


_LISTS = {"empty": b"", "blank": b" \n \n", "Latin-1": b"caf\xe9"}
_VALID = {"classes": ["a", "b"]}
PROMPTS.add_table(_read_prompts, {"valid": _VALID}, expects="used")
PROMPTS.add_table(
  _read_prompts,
  BROKEN_JSON
  | {"without classes": {"templates": ["{}"]}}
  | changed(
    _VALID,
    {
      "classes": [[], "cat", [1], [""]],
      "templates": [{"a": 1}, ["x"], ["{} {}"], [""]],
      "ids": [[1, 2], ["a"], ["a", "b", "c"], ["a", "a"]],
    },
  ),
)
PROMPTS.add_table(_read_list, _LISTS, prefix="a list: ")
PROMPTS.add_table(_read_phrases, _LISTS, prefix="phrases: ")
PROMPTS.add(
  "a missing file", lambda folder: prompts.read_prompts(folder / "a.json")
)
PROMPTS.add("an empty folder", prompts.read_prompts)


# --- Answers and truths ------------------------------------------------------


def _read_answers(folder, content):
  return vqa.read_answers(samples.write(folder, "a", content))


def _read_truths(folder, content):
  return vqa.read_questions(samples.write(folder, "a", content))


def _rows(valid, values):
  return {name: [row] for name, row in changed(valid, values).items()}


_ANSWER, _TWICE = {"id": 1, "answer": "a"}, {"id": "1", "answer": "b"}
ANSWERS.add_table(_read_answers, {"valid": [_ANSWER]}, expects="used")
ANSWERS.add_table(_read_answers, {"twice": [_ANSWER, _TWICE]}, match="twice")
_answers = {"answer": [None, ["a"], {"a": 1}], "id": [None, [1]]}
_missing = {"no answer": [{"id": 1}], "no question": [{"answer": "a"}]}
ANSWERS.add_table(_read_answers, _rows(_ANSWER, _answers) | _missing)
_truths = {"answer": [None], "answer_type": [["x"]]}
_lists = [[], [{"x": 1}], [["a"]], {"a": 1}, [{"answer": None}]]
_options = {"options": ["ab", 3, [{"a": 1}]]}
_indices = {"answer": [9, -1, 10**391]}
ANSWERS.add_table(
  _read_truths,
  _rows(_ANSWER, _truths)
  | _rows({"id": 1}, {"answers": _lists})
  | _rows({"id": 1, "answer": 0}, _options)
  | _rows({"id": 1, "options": ["a"]}, _indices),
  prefix="truths: ",
)
_broken = BROKEN_JSON | {"an empty list": b"[]"}
ANSWERS.add_table(_read_answers, _broken, prefix="answers: ")
ANSWERS.add_table(_read_truths, _broken, prefix="truths: ")
ANSWERS.add("a missing file", lambda folder: vqa.read_answers(folder / "a"))


# --- Detectors ---------------------------------------------------------------


def _read_input(folder, arguments):
  """The input of a session, which onnxruntime gives as names and numbers."""
  shape, kind, size = (*arguments, "tensor(float)", None)[:3]
  node = types.SimpleNamespace(name="image", type=kind, shape=shape)
  session = types.SimpleNamespace(get_inputs=lambda: [node])
  return list(detector._read_input(session, size))


DETECTORS.add_table(_read_input, {"valid": (["n", 3, 8, 8],)}, expects="used")
_FLOAT, _OPEN = "tensor(float)", ["n", 3, "h", "w"]
DETECTORS.add_table(
  _read_input,
  {
    "a side of 0": (["n", 3, 0, 8],),
    "a vast side": (["n", 3, 1 << 40, 8],),
    "a batch of 0": ([0, 3, 8, 8],),
    "one channel": ([1, 1, 8, 8],),
    "integers": ([1, 3, 8, 8], "tensor(int32)"),
    "an open side": (_OPEN,),
    "a size of 0": (_OPEN, _FLOAT, 0),
    "a vast size": (_OPEN, _FLOAT, 1 << 40),
    "another size": (["n", 3, 8, 8], _FLOAT, 16),
  },
)


def _make_onnx(shape=(1, 3, 8, 8), kind=1, classes=1) -> bytes:
  from onnx import helper

  make = helper.make_tensor_value_info
  value = np.zeros((1, 5 + classes, 2, 2), np.float32)
  constant = helper.make_tensor("c", 1, value.shape, value.ravel())
  node = helper.make_node("Constant", [], ["out"], value=constant)
  inputs, outputs = make("in", kind, shape), make("out", 1, value.shape)
  graph = helper.make_graph([node], "g", [inputs], [outputs])
  opset = [helper.make_opsetid("", 13)]
  model = helper.make_model(graph, ir_version=8, opset_imports=opset)
  return model.SerializeToString()


def _read_onnx(folder, options):
  options = dict(options)
  names = samples.write(folder, "names.txt", options.pop("names", b"a\n"))
  content = options.pop("data", None)
  content = _make_onnx(**options) if content is None else content
  path = samples.write(folder, "a.onnx", content)
  return detector.OnnxDetector(path, names=names)


FILES.add_table(_read_onnx, {"valid": {}}, expects="used")
FILES.add_table(
  _read_onnx,
  {
    "empty": {"data": b""},
    "text": {"data": b"hello"},
    "binary": {"data": bytes(range(256)) * 40},
    "a length of 2^60": {"data": b"\x3a" + b"\xff" * 8 + b"\x0f"},
    "integers": {"kind": 6},
    "a side of 0": {"shape": (1, 3, 0, 8)},
    "an open side": {"shape": (1, 3, None, 8)},
    "too many classes": {"classes": 7},
    "no class": {"classes": 0},
    "a blank name": {"names": b"a\n\nb\n"},
  },
)
_HAS_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))

test_texts = run_all(PROMPTS, ANSWERS, DETECTORS, *[FILES] * _HAS_ONNX)
