"""Hostile tokenizer files, and texts for good ones."""

import json
import os

import numpy as np
import sentencepiece
import tokenizers
from hostile.harness import Cases
from hostile.samples import read_record
from tokenizers import models, pre_tokenizers, processors

from mtv_jax.data.tokenizers import build_tokenizer

FILES = Cases(__file__, "tokenizer files", slow=True)
TEXTS = Cases(__file__, "texts for tokenizers", slow=True)

_NOISE = np.random.default_rng(0).bytes(4000)
_VOCABULARY = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "dog": 4}


def _word_level(vocabulary=_VOCABULARY) -> dict:
  model = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>"))
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return json.loads(model.to_str())


def _file(name, content, expects="error", *, config=None):
  """A tokenizer is built from the file, and used for a caption."""

  def run(folder):
    data = content() if callable(content) else content
    if not isinstance(data, bytes):
      data = json.dumps(data).encode()
    (folder / "tokenizer.json").write_bytes(data)
    if config is not None:
      (folder / "tokenizer_config.json").write_bytes(config)
    tokenizer = build_tokenizer(folder / "tokenizer.json")
    return read_record(folder, tokenizer=tokenizer)

  FILES.add(name, run, expects=expects)


for _name, _data in {
  "empty": b"",
  "noise": _NOISE,
  "a list": b"[]",
  "null": b"null",
  "an empty object": b"{}",
  "nested 100,000 deep": b"[" * 100_000,
  "latin-1": b'{"model": "\xff"}',
  "no vocabulary": lambda: _word_level({}),
  "without a padding token": lambda: _word_level({"a": 0, "<unk>": 1}),
  "an id of 2^32 - 1": lambda: _word_level(_VOCABULARY | {"x": 2**32 - 1}),
  "an id of -1": lambda: _changed(lambda t: t["model"]["vocab"].update(a=-1)),
  "an id of 2^40": lambda: _changed(
    lambda t: t["model"]["vocab"].update(a=2**40)
  ),
  "an id that is a text": lambda: _changed(
    lambda t: t["model"]["vocab"].update(a="3")
  ),
  "an unknown model": lambda: _changed(
    lambda t: t["model"].update(type="Tree")
  ),
  "an unknown normalizer": lambda: _changed(
    lambda t: t.update(normalizer={"type": "Magic"})
  ),
  "a pattern that is no regular expression": lambda: _changed(
    lambda t: t.update(
      normalizer={
        "type": "Replace",
        "pattern": {"Regex": "("},
        "content": "",
      }
    )
  ),
  "a cut character map": lambda: _changed(
    lambda t: t.update(
      normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}
    )
  ),
  "a template of unknown tokens": lambda: _changed(
    lambda t: t.update(
      post_processor={
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
      }
    )
  ),
}.items():
  _file(f"tokenizer.json, {_name}", _data)


def _changed(change):
  content = _word_level()
  change(content)
  return content


for _name, _data in {
  "not JSON": b"{",
  "a list": b"[]",
  "null": b"null",
  "nested 100,000 deep": b"[" * 100_000,
  "latin-1": b'{"pad_token": "\xff"}',
  "tokens that are numbers": b'{"pad_token": 3, "eos_token": []}',
}.items():
  _file(f"tokenizer_config.json, {_name}", lambda: _word_level(), config=_data)
_file(
  "tokenizer_config.json, unknown tokens",
  lambda: _word_level(),
  "used",
  config=b'{"pad_token": "[NONE]"}',
)

# A model that fails on each text is a config mistake.
_file(
  "tokenizer.json, without its unknown token",
  lambda: _changed(
    lambda t: t["model"].update(unk_token="[NONE]", vocab={"<pad>": 0})
  ),
)
_file(
  "tokenizer.json, BPE of merges that it lacks",
  lambda: {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"<pad>": 0}, "merges": ["a b"]},
  },
)
_file(
  "tokenizer.json, unigram without pieces",
  lambda: {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "Unigram", "unk_id": 0, "vocab": []},
  },
)
_file(
  "tokenizer.json, unigram of an unknown id",
  lambda: {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "Unigram", "unk_id": 9, "vocab": [["<pad>", 0.0]]},
  },
)


def _sentencepiece(folder) -> bytes:
  prefix = str(folder / "spiece")
  texts = ["a dog and a cat", "a red ball", "two cones and a house"] * 20
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_prefix=prefix,
    vocab_size=40,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return (folder / "spiece.model").read_bytes()


def _spiece(name, change, expects="error"):
  @FILES.add(f"SentencePiece, {name}", expects=expects)
  def _(folder):
    data = change(_sentencepiece(folder))
    (folder / "x.model").write_bytes(data)
    tokenizer = build_tokenizer(folder / "x.model")
    return read_record(folder, tokenizer=tokenizer)


_spiece("empty", lambda data: b"")
_spiece("noise", lambda data: _NOISE)
_spiece("zeros", lambda data: bytes(4000))
_spiece("a web page", lambda data: b"<html>404</html>")
_spiece("a pickle", lambda data: b"\x80\x04\x8c\x05posix\x94.")
_spiece("half", lambda data: data[: len(data) // 2], "error used")
_spiece("without its last byte", lambda data: data[:-1], "error used")
_spiece("twice", lambda data: data * 2, "error used")
_spiece(
  "ones at its end", lambda data: data[:-100] + b"\xff" * 100, "error used"
)


@FILES.add("a pipe")
def _pipe(folder):
  os.mkfifo(folder / "tokenizer.json")
  build_tokenizer(folder / "tokenizer.json")


@FILES.add("a folder")
def _folder(folder):
  (folder / "x.model").mkdir()
  build_tokenizer(folder / "x.model")


@FILES.add("a name of NUL")
def _nul(folder):
  build_tokenizer("a\0.json")


@FILES.add("a name of a lone surrogate")
def _surrogate(folder):
  build_tokenizer("\ud800.json")


# --- Texts -------------------------------------------------------------------


def _build(kind, folder):
  if kind in ("bytes", "words"):
    return build_tokenizer(kind)
  if kind == "sentencepiece":
    _sentencepiece(folder)
    return build_tokenizer(folder / "spiece.model")
  letters = {chr(c): 3 + c - 97 for c in range(97, 123)}
  vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **letters}
  if kind == "bpe":
    pairs = [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa"), ("d", "o")]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(pairs)}
    model = models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>")
  elif kind == "unigram":
    model = models.Unigram([(k, -1.0) for k in vocabulary], unk_id=2)
  else:
    model = models.WordPiece(vocabulary, unk_token="<unk>")
  model = tokenizers.Tokenizer(model)
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  model.post_processor = processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  model.save(str(folder / "tokenizer.json"))
  return build_tokenizer(folder / "tokenizer.json")


_ODD = {
  "100,000 times one letter": "a" * 100_000,
  "100,000 letters": "".join(chr(97 + i * i % 26) for i in range(100_000)),
  "50,000 words": "a " * 50_000,
  "controls": "".join(map(chr, range(1, 32))) + "a",
  "noncharacters": "\ufffe\uffff\U0010ffff a",
  "combining marks": "e" + "\u0301" * 20_000,
  "direction marks": "\u202e\u2066 dog",
  "special tokens": "<pad></s><unk>" * 100 + "a",
}
for _kind in ("bytes", "words", "sentencepiece", "bpe", "unigram", "wordpiece"):
  for _name, _text in _ODD.items():
    TEXTS.add(
      f"{_kind}, {_name}",
      lambda folder, kind=_kind, text=_text: read_record(
        folder, text=text, tokenizer=_build(kind, folder)
      ),
      expects="used skip",
    )
  TEXTS.add(
    f"{_kind}, a lone surrogate",
    lambda folder, kind=_kind: read_record(
      folder,
      text=None,
      json={"caption": "a \ud800"},
      tokenizer=_build(kind, folder),
    ),
    expects="skip",
    match="h: ",
  )


@FILES.parametrize
def test_tokenizer_files(case, hostile):
  hostile(case)


@TEXTS.parametrize
def test_texts_for_tokenizers(case, hostile):
  hostile(case)
