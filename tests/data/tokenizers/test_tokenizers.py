"""Ids compared with `transformers`, `sentencepiece` and written-out rules."""

import json
import pickle
import shutil
import sys
import threading

import numpy as np
import pytest
import sentencepiece
import tokenizer_parity
import tokenizers as hf

from mtv_jax.data import tokenizers
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.data.tokenizers import (
  build_tokenizer,
  builtin,
  canonicalize,
  export_files,
)
from mtv_jax.evals.core import prompts
from mtv_jax.utils.errors import ConfigError, InputError

CLEAN = ("none", "lower", "canonicalize")
ODD = [text for text in tokenizer_parity.TEXTS if "<" not in text]
ODD += [".a", "snake_case _", "1,000 don't (hello", "\u201cquoted\u201d", "!!!"]
ODD += [
  "\u03a3\u0391\u03a3 \u03a3 \u03a3a 1\u03a3.",
  "a\u03a3\u0301\u0392 a\u0301\u03a3",
]


@pytest.fixture(scope="module")
def spiece(shared_data) -> str:
  path = shared_data / "tokenizers" / "t5_cc_all_32000.spiece.model"
  return str(path)


@pytest.fixture(scope="module")
def captions(shared_data) -> list[str]:
  path = shared_data / "coco" / "annotations" / "captions_val2017.json"
  annotations = json.loads(path.read_text())["annotations"]
  return [a["caption"] for a in annotations[:300]] + ODD


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
  """A small SentencePiece model."""
  path = tmp_path_factory.mktemp("spiece") / "small.model"
  ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
  tokenizer_parity.train_sentencepiece(path, vocab_size=120, **ids)
  return str(path)


@pytest.fixture(scope="module")
def words_json(tmp_path_factory) -> str:
  """A word-level tokenizer.json with a start token, padding and an end."""
  names = ["<pad>", "<start>", "</s>", "<unk>", "a", "dog", "cat", "red"]
  model = hf.Tokenizer(
    hf.models.WordLevel({n: i for i, n in enumerate(names)}, "<unk>")
  )
  model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  model.post_processor = hf.processors.TemplateProcessing(
    single="<start> $A </s>", special_tokens=[("<start>", 1), ("</s>", 2)]
  )
  path = tmp_path_factory.mktemp("json") / "tokenizer.json"
  model.save(str(path))
  return str(path)


def test_clip_cleans_as_its_code():
  """By `whitespace_clean(basic_clean(text)).lower()` of openai/CLIP."""
  pytest.importorskip("ftfy")
  tokenizer = build_tokenizer("bytes", clean="clip")
  for text, expected in {
    "A caf\u00c3\u00a9 &amp;amp; bar": "a caf\u00e9 & bar",
    " \u201cTwo\u201d&nbsp;\n dogs &lt;3 ": '"two" dogs <3',
    "\ufb01ne\uff01": "fine!",
  }.items():
    assert tokenizer.clean_text(text) == expected
  assert tokenizer.is_blank("&nbsp; ") and not tokenizer.is_blank("&amp;")


def test_clip_cleaning_names_the_package_that_it_needs(monkeypatch):
  monkeypatch.setitem(sys.modules, "ftfy", None)
  with pytest.raises(InputError, match="pip install ftfy"):
    build_tokenizer("bytes", clean="clip")


def test_bytes():
  tokenizer = build_tokenizer("bytes", clean="none")
  ids = tokenizer.encode(["Hi", "", "\u00e9"], 5)
  assert ids.dtype == np.int32
  assert ids.tolist() == [
    [74, 107, 1, 0, 0],
    [1, 0, 0, 0, 0],
    [0xC3 + 2, 0xA9 + 2, 1, 0, 0],
  ]
  assert tokenizer.vocab_size == 258
  assert tokenizer.encode(["\u00ff"], 9).max() < 258
  assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)


def test_words_of_scenes():
  tokenizer = build_tokenizer("words")
  ids = tokenizer.encode(["A red ball, on grass", "a zebra: a red ball"], 8)
  a, red, ball, on, grass, zebra = (
    tokenizer._tokenize(word, 2)[0][0]
    for word in ("a", "red", "ball", "on", "grass", "zebra")
  )
  assert zebra == 2 and len({0, 1, zebra, a, red, ball, on, grass}) == 8
  assert ids.tolist() == [
    [a, red, ball, on, grass, 1, 0, 0],
    [a, zebra, a, red, ball, 1, 0, 0],
  ]
  assert tokenizer.decode(ids.tolist())[0] == "a red ball on grass"


@pytest.mark.slow
def test_words_include_those_of_all_scenes():
  tokenizer, texts = build_tokenizer("words"), [*prompts.DEFAULT_TEMPLATES]
  for difficulty in ("easy", "medium", "hard"):
    source = SceneSource(16, length=200, difficulty=difficulty)
    for i in range(200):
      texts += [*source[i]["captions"], *source[i]["phrases"]]
  # A blank for the class's name.
  texts = [text.replace("{}", "") for text in texts]
  ids = tokenizer.encode(texts, 64)
  assert 2 not in ids
  assert tokenizer.vocab_size == 3 + len({*builtin._WORDS}) == 129


def test_texts_that_are_cut(small, words_json):
  text = "a dog cat red"
  for spec in ("bytes", "words", small, words_json):
    tokenizer = build_tokenizer(spec)
    # Padding, which is SentencePiece's end of sequence, is not text.
    long = tokenizer.encode([text], 64)[0]
    other = tokenizer.pad_id
    count = int(np.flatnonzero(long != other)[-1]) + 1
    count += tokenizer.pad_id == tokenizer.eos_id
    cut = [tokenizer.is_cut(text, n) for n in (count - 1, count, count + 1)]
    assert cut == [True, False, False], spec
    assert not tokenizer.is_cut("", 64)
  assert build_tokenizer("bytes").is_cut("abc", 3)
  assert not build_tokenizer("bytes").is_cut("abc", 4)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_truncation_keeps_the_end_last(length, small):
  for spec in ("bytes", small):
    tokenizer = build_tokenizer(spec)
    ids = tokenizer.encode(["the red dog by the blue box"], length)
    assert ids.shape == (1, length)
    assert ids[0, -1] == tokenizer.eos_id
    assert (ids[0, :-1] != tokenizer.eos_id).all()


def test_sentencepiece_is_padded_with_its_end(small):
  tokenizer = build_tokenizer(small, clean="lower")
  model = sentencepiece.SentencePieceProcessor(model_file=small)
  expected = model.encode("a red dog") + [1]
  ids = tokenizer.encode(["A red DOG"], 32)[0]
  assert ids[: len(expected)].tolist() == expected
  assert (ids[len(expected) :] == 1).all()
  assert tokenizer.kind == "sentencepiece"
  assert tokenizer.vocab_size == model.vocab_size()


def test_json_uses_special_tokens_of_the_file(words_json):
  tokenizer = build_tokenizer(words_json, clean="lower")
  ids = tokenizer.encode(["A red dog", "a zebra", "a a a a a a a a"], 6)
  assert ids.tolist() == [
    [1, 4, 7, 5, 2, 0],
    [1, 4, 3, 2, 0, 0],
    [1, 4, 4, 4, 4, 2],
  ]
  assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 2)
  assert tokenizer.vocab_size == 8
  # JSON may hold half a character.
  assert tokenizer.encode(["a\ud83d"], 6).tolist() == [
    tokenizer.encode_text("a?", 6)[0].tolist()
  ]


def test_json_special_tokens_from_tokenizer_config(words_json, tmp_path):
  shutil.copy(words_json, tmp_path)
  config = {"pad_token": {"content": "</s>"}, "eos_token": "<start>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  tokenizer = build_tokenizer(tmp_path / "tokenizer.json")
  assert (tokenizer.pad_id, tokenizer.eos_id) == (2, 1)


def test_json_special_tokens_are_matched_before_cleaning(words_json, tmp_path):
  model = hf.Tokenizer.from_file(words_json)
  model.add_special_tokens(["</s>", "<pad>"])
  model.add_tokens(["Fish"])  # Matched after cleaning, as transformers does.
  model.save(str(tmp_path / "tokenizer.json"))
  tokenizer = build_tokenizer(tmp_path / "tokenizer.json", clean="lower")
  texts = ["A </s> DOG", "A </S> dog", "A FISH Fish fish"]
  ids = tokenizer.encode(texts, 9)
  assert ids.tolist() == [
    [1, 4, 2, 5, 2, 0, 0, 0, 0],
    [1, 4, 3, 3, 3, 5, 2, 0, 0],
    [1, 4, 8, 8, 8, 2, 0, 0, 0],
  ]
  (tmp_path / "out").mkdir()
  export_files(tokenizer, tmp_path / "out")
  again = build_tokenizer(tmp_path / "out" / "tokenizer.json", clean="none")
  np.testing.assert_array_equal(again.encode(texts, 9), ids)


def test_canonicalize():
  assert canonicalize("  A_Dog,  (big)\n!") == "a dog big"
  assert canonicalize("don't STOP") == "dont stop"
  assert canonicalize("?!") == ""


def test_threads_share_a_tokenizer(words_json, small):
  texts = ["a red dog", "a cat", "dog"] * 20
  for spec in ("bytes", "words", words_json, small):
    tokenizer = build_tokenizer(spec)
    expected = {n: tokenizer.encode(texts, n) for n in (4, 8)}
    wrong = []

    def work(n: int, tokenizer=tokenizer, expected=expected, wrong=wrong):
      for _ in range(10):
        if not np.array_equal(tokenizer.encode(texts, n), expected[n]):
          wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in (4, 8) * 2]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert not wrong


def test_pickle_round_trip(words_json, small):
  for spec in ("bytes", "words", words_json, small):
    tokenizer = build_tokenizer(spec, clean="canonicalize")
    again = pickle.loads(pickle.dumps(tokenizer))
    assert repr(again) == repr(tokenizer)
    texts = ["a RED, dog", ""]
    np.testing.assert_array_equal(
      again.encode(texts, 9), tokenizer.encode(texts, 9)
    )


def test_errors(tmp_path, small):
  for name in ("a.model", "a.json"):
    (tmp_path / name).write_bytes(b"{}")
  for spec, clean, error, message in (
    ("", "lower", ConfigError, ":tokenizer=PATH"),
    (small[:-7] + ".model", "lower", FileNotFoundError, "mean 'small.model'"),
    (tmp_path / "none" / "x.json", "lower", FileNotFoundError, "no folder"),
    ("byte", "lower", ValueError, "mean 'bytes'. There are: bytes, quest"),
    ("bytes", "lowr", ValueError, "Did you mean 'lower'"),
    (tmp_path / "a.model", "lower", ValueError, "SentencePiece"),
    (tmp_path / "a.json", "lower", ValueError, "tokenizer"),
  ):
    with pytest.raises(error, match=message):
      build_tokenizer(spec, clean=clean)
  tokenizer = build_tokenizer("bytes")
  with pytest.raises(TypeError, match="list of strings"):
    tokenizer.encode("a dog", 8)
  with pytest.raises(ValueError, match="length=0"):
    tokenizer.encode(["a dog"], 0)
  tokenizers.check_vocabulary(tokenizer, 258)
  message = r"model\.text\.vocab_size=257 .* 257.*258 or more"
  with pytest.raises(ValueError, match=message):
    tokenizers.check_vocabulary(tokenizer, 257)


@pytest.mark.parametrize("clean", CLEAN)
def test_exported_files_give_equal_ids(clean, small, words_json, tmp_path):
  """As read by `tokenizers` itself; by `transformers` below."""
  for spec in ("bytes", "words", small, words_json):
    tokenizer = build_tokenizer(spec, clean=clean)
    export_files(tokenizer, tmp_path, length=12)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
      "tokenizer.json",
      "tokenizer_config.json",
    ]
    # The file now includes the cleaning.
    again = build_tokenizer(tmp_path / "tokenizer.json", clean="none")
    np.testing.assert_array_equal(
      again.encode([*ODD, "A Red dog_."], 12),
      tokenizer.encode([*ODD, "A Red dog_."], 12),
    )
    assert again.pad_id == tokenizer.pad_id
    assert again.eos_id == tokenizer.eos_id


@pytest.mark.parametrize("fallback", [False, True])
def test_exported_bpe_gives_equal_ids(fallback, tmp_path):
  texts = [*ODD, "two dogs  and 3 cats"]
  tokenizer_parity.train_sentencepiece(
    tmp_path / "bpe.model",
    model_type="bpe",
    vocab_size=400 if fallback else 120,
    byte_fallback=fallback,
    bos_id=-1,
    eos_id=0,
    unk_id=1,
    pad_id=-1,
  )
  tokenizer = build_tokenizer(tmp_path / "bpe.model")
  export_files(tokenizer, tmp_path)
  again = build_tokenizer(tmp_path / "tokenizer.json")
  ids = tokenizer.encode(texts, 64)
  np.testing.assert_array_equal(again.encode(texts, 64), ids)
  assert again.decode(ids[-1:].tolist()) == ["two dogs and 3 cats"]


@pytest.mark.parametrize("add_end", [False, True])
def test_a_sentencepiece_model_as_a_folder_of_transformers(add_end, tmp_path):
  path = tmp_path / "tokenizer.model"
  tokenizer_parity.train_sentencepiece(path, **tokenizer_parity.TIPS)
  model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  build_tokenizer(path).write_folder(tmp_path, add_end=add_end)
  tokenizer = build_tokenizer(tmp_path / "tokenizer.json", clean="lower")
  assert tokenizer.pad_id == 0
  texts = [t for t in tokenizer_parity.TEXTS if "<pad>" not in t]
  ids = tokenizer.encode(texts, 64)
  assert (ids[:, -1] == 0).sum() > 10
  for text, row in zip(texts, ids, strict=True):
    pieces = model.encode(tokenizer.clean_text(text))[: 64 - add_end]
    expected = pieces + [1] * add_end
    expected += [0] * (64 - len(expected))
    np.testing.assert_array_equal(row, expected, err_msg=repr(text))


def test_other_sentencepiece_kinds_are_not_exported(small, tmp_path):
  path = tmp_path / "word.model"
  tokenizer_parity.train_sentencepiece(path, model_type="word", vocab_size=30)
  tokenizer = build_tokenizer(path)
  with pytest.raises(ValueError, match="kind WORD"):
    export_files(tokenizer, tmp_path)
  tokenizer_parity.train_sentencepiece(path, vocab_size=60)
  with pytest.raises(ValueError, match="no padding piece.*pad_id"):
    build_tokenizer(path).write_folder(tmp_path, add_end=True)


@pytest.mark.reference
def test_sentencepiece_equals_siglip_tokenizer(spiece, captions):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.SiglipTokenizer(spiece)
  ours = build_tokenizer(spiece, clean="canonicalize")
  # transformers drops "_"; big_vision and we replace it by a space.
  texts = [text for text in captions if "_" not in text]
  assert len(texts) > 300
  expected = theirs(
    texts, padding="max_length", max_length=64, truncation=True
  )["input_ids"]
  np.testing.assert_array_equal(ours.encode(texts, 64), expected)
  assert ours.pad_id == theirs.pad_token_id
  assert ours.eos_id == theirs.eos_token_id


@pytest.mark.reference
@pytest.mark.parametrize("clean", CLEAN)
def test_transformers_opens_the_exported_files(
  clean, spiece, captions, tmp_path
):
  transformers = pytest.importorskip("transformers")
  transformers.SiglipConfig().save_pretrained(tmp_path)
  transformers.SiglipImageProcessorPil().save_pretrained(tmp_path)
  for spec in (spiece, "bytes"):
    tokenizer = build_tokenizer(spec, clean=clean)
    export_files(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs(
      captions, padding="max_length", max_length=64, truncation=True
    )
    assert list(expected) == ["input_ids"]
    np.testing.assert_array_equal(
      tokenizer.encode(captions, 64), expected["input_ids"]
    )
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    expected = processor(text=captions, padding="max_length", truncation=True)
    np.testing.assert_array_equal(
      tokenizer.encode(captions, 64), expected["input_ids"]
    )


def test_unknown_words_are_named_once(small, words_json, caplog):
  texts = ["a dog, a cat", "a red xyzzy", "a \u732b dog."]
  expected = {
    "words": ["'dog', 'cat', 'xyzzy', '\u732b'", "'zebra'"],
    words_json: ["'xyzzy', '\u732b'", "'zebra'"],
    small: ["'\u732b'"],
    "bytes": [],
  }
  for spec, names in expected.items():
    caplog.clear()
    tokenizer = build_tokenizer(spec)
    for given in (texts, texts, ["a zebra"]):
      tokenizer.encode(given, 16)
    for message, words in zip(caplog.messages, names, strict=True):
      assert f"doesn't know {words}. Unknown words share one id" in message
