"""Templates of conversations, their op, and LLaVA's files."""

import json

import numpy as np
import pytest
from PIL import Image

from mtv_jax.data.conversations import IMAGE_ID, TEMPLATES
from mtv_jax.data.ops import build_ops, find_op
from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.records import BadRecord, NoRecordsError
from mtv_jax.data.registry import build_source
from mtv_jax.data.tokenizers import build_tokenizer, export_files
from mtv_jax.utils.errors import InputError, MissingFileError

TURNS = ["<image>\nWhat?", "A cat.", "Where?", "There."]
# Text and answers in brackets, `*` the image, `|` an end of answers.
EXPECTED = {
  "plain": "*[A cat.\nThere.\n]",
  "lines": "*\nWhat?\n[A cat.|]Where?\n[There.|]",
  "vicuna": (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's "
    "questions. USER: *\nWhat? ASSISTANT:[ A cat.|]USER: Where? ASSISTANT:"
    "[ There.|]"
  ),
  "chatml": (
    "(system\nYou are a helpful assistant.)\n(user\n*\nWhat?)\n(assistant\n"
    "[A cat.)]\n(user\nWhere?)\n(assistant\n[There.)]"
  ),
}


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
  """Bytes, with the special tokens of Qwen's templates."""
  folder = tmp_path_factory.mktemp("chat")
  tokenizer = build_tokenizer("bytes", clean="none")
  model = tokenizer.to_hf_tokenizer()
  export_files(tokenizer, folder)
  model.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  model.add_tokens(["R: W"])
  (folder / "tokenizer.json").write_text(model.to_str())
  return str(folder / "tokenizer.json")


def show(ids, answers):
  symbols = {IMAGE_ID: "*", 1: "|", 258: "(", 259: ")", 260: "R: W"}
  text, before = "", False
  for token, is_answer in zip(ids, answers, strict=True):
    if is_answer != before:
      text += "[" if is_answer else "]"
    text += symbols.get(token) or chr(token - 2)
    before = is_answer
  return text + ("]" if before else "")


@pytest.mark.parametrize("template", EXPECTED)
def test_templates(template, chat_tokenizer):
  op = find_op(
    f"decode|conversation(400, {chat_tokenizer!r}, template={template!r})"
  )
  assert show(*op.text.encode(TURNS)) == EXPECTED[template]
  # A question without an image is one text with what precedes it.
  assert (260 in op.text.encode_prompt("Where?")) == (template == "vicuna")
  prompt = op.text.encode_prompt(TURNS[0])
  assert op.text.encode(TURNS)[0][: len(prompt)] == prompt
  answer = op.text.encode(TURNS[:2])[0][len(prompt) :]
  assert answer[-1] == op.text.stop_id
  assert op.text.decode([[*answer, op.text.stop_id, 70]]) == ["A cat."]


def test_templates_need_their_tokens():
  for template in ("chatml", "llama3"):
    for name in ("bytes", "words"):  # Two bytes and more; an unknown word.
      with pytest.raises(InputError, match="not a token of"):
        _ = find_op(f"conversation(9, {name!r}, template={template!r})").text
  with pytest.raises(InputError, match="drops"):
    _ = find_op("conversation(9, 'words', template='plain')").text
  assert {*EXPECTED, "llama3"} == {*TEMPLATES}


def test_rows():
  ops = build_ops("conversation(12, template='lines')")
  rng = np.random.default_rng(0)

  def run(**record):
    return ops({"key": "k", **record}, rng)

  row = run(conversation=["<image>ab", "cd"])
  ids, answers = row["conversation"], row["conversation_answer"]
  assert show(ids[:8], answers[:8]) == "*\nab\n[cd|]"
  assert not ids[8:].any() and not answers[8:].any()
  assert +row["texts"] == {"conversations": 1}
  cut = run(conversation=["ab", "c" * 20])
  assert cut["conversation_answer"].sum() == 9
  assert cut["texts"]["conversations_cut"] == 1
  captioned = run(captions=["hi"])
  assert captioned["conversation"][:6].tolist() == [-1, 12, 12, 106, 107, 1]
  assert not run()["conversation_answer"].any()
  for turns, reason in (
    (["x" * 12, "y"], "not within 12 tokens"),
    (["<image><image>", "y"], "several times"),
    (["\ud800", "y"], "not Unicode"),
    (["x" * 200_000, "y"], "100,000 characters"),
  ):
    with pytest.raises(BadRecord, match=reason):
      run(conversation=turns)


def turn(value, role="human"):
  return {"from": role, "value": value}


def write(folder, rows):
  (folder / "data.json").write_text(json.dumps(rows))
  return dict(type="conversations", path=str(folder / "data.json"))


def test_files_of_llava(tmp_path):
  Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
  good = dict(
    id="x", image="a.png", conversations=[turn("<image>?"), turn("!", "gpt")]
  )
  text = dict(id=7, conversations=[turn("?"), turn("!", "gpt")])
  bad = {
    "expected an object": 3,
    "conversations is missing": dict(id="x"),
    "1 turns": dict(conversations=[turn("?")]),
    "from is 'human'; expected 'gpt'": dict(conversations=[turn("?")] * 2),
    "value": dict(conversations=[turn(3), turn("!", "gpt")]),
    "names no image": {**good, "image": None},
    "no question has <image>": {**text, "image": "a.png"},
    "can't be read": {**good, "image": "b.png"},
    r"without '\.\.'": {**good, "image": "../a.png"},
  }
  source = build_source(write(tmp_path, [good, text, *bad.values()]))
  assert source[0]["conversation"] == ["<image>?", "!"]
  assert source[0]["image"] == (tmp_path / "a.png").read_bytes()
  assert source[1]["key"] == "1:7" and source[1]["image"].dtype == np.uint8
  assert source.read_metadata(0)["file_name"] == "a.png"
  for i, reason in enumerate(bad):
    with pytest.raises(BadRecord, match=reason):
      source[2 + i]
  blind = build_source(write(tmp_path, [good]) | dict(text_only=True))
  assert blind[0]["conversation"] == ["?", "!"]

  for rows, error in (([], NoRecordsError), ({"a": 1}, InputError)):
    with pytest.raises(error, match=r"data\.json"):
      build_source(write(tmp_path, rows))
  for key in ("path", "images"):
    entry = write(tmp_path, [good]) | {key: str(tmp_path / "none")}
    with pytest.raises(MissingFileError, match="none"):
      build_source(entry)


def test_sources_without_texts_and_texts_that_are_cut(tmp_path, caplog):
  Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
  ops = "decode|canvas(8)|conversation(12, template='lines')"

  def read(source):
    config = dict(train=[source], ops=ops)
    with make_loader(config, batch_size=1, seed=0) as loader:
      return next(loader)

  with pytest.raises(InputError, match="captions or conversation"):
    read(dict(type="folder", path=str(tmp_path), captions="ignored"))
  turns = [turn("<image>?"), turn("!" * 30, "gpt")]
  read(write(tmp_path, [dict(image="a.png", conversations=turns)]))
  assert "Raise the length of `conversation`" in caplog.text
