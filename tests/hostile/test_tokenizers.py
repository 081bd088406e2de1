"""Hostile tokenizer files, and texts for good ones."""

import json
import os

import tokenizer_parity
import tokenizers
from hostile import foreign_samples
from hostile.harness import Cases, run_all
from hostile.samples import (
  BROKEN_BYTES,
  BROKEN_JSON,
  DAMAGED_BYTES,
  as_bytes,
  by_repr,
  changed,
  other_types,
  read_record,
)
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models, pre_tokenizers, processors

from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.experts.owlv2_model import ClipTokenizer

FILES = Cases(__file__, "tokenizer files")
TEXTS = Cases(__file__, "texts for tokenizers")

NAN = float("nan")
_VOCABULARY = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "dog": 4}


def _json(**changed) -> dict:
  model = tokenizers.Tokenizer(models.WordLevel(_VOCABULARY, "<unk>"))
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return json.loads(model.to_str()) | changed


def _model(**changed) -> dict:
  return _json(model=_json()["model"] | changed)


def _vocabulary(**changed) -> dict:
  return _model(vocab=_VOCABULARY | changed)


def _read(folder, content):
  """A tokenizer is built from a tokenizer.json, and used for a caption."""
  (folder / "tokenizer.json").write_bytes(as_bytes(content))
  tokenizer = build_tokenizer(folder / "tokenizer.json")
  return read_record(folder, tokenizer=tokenizer)


_SPLIT = {"behavior": "Isolated", "invert": False}
_TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
_TEMPLATE["single"] = [{"SpecialToken": {"id": "[X]", "type_id": 0}}]
FILES.add_table(_read, {"valid": _json()}, expects="used")
FILES.add_table(
  _read,
  {
    **BROKEN_JSON,
    "an empty object": {},
    "without a model": _json(model=None),
    "no vocabulary": _model(vocab={}),
    "without a padding token": _model(vocab={"a": 0, "<unk>": 1}),
    "an id of 2^32 - 1": _vocabulary(x=2**32 - 1),
    "an id of 2^40": _vocabulary(a=2**40),
    "an unknown model": _model(type="Tree"),
    # A model that fails on each text is a config mistake.
    "without its unknown token": _model(unk_token="X", vocab={"<pad>": 0}),
    "an unknown normalizer": _json(normalizer={"type": "Magic"}),
    "a pattern that is no regular expression": _json(
      normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}
    ),
    "a split by no regular expression": _json(
      pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, **_SPLIT}
    ),
    "a cut character map": _json(
      normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}
    ),
    "a template of unknown tokens": _json(post_processor=_TEMPLATE),
    "BPE of merges that it lacks": _json(
      model={"type": "BPE", "vocab": {"<pad>": 0}, "merges": ["a b"]}
    ),
    "unigram of an unknown id": _json(
      model={"type": "Unigram", "unk_id": 9, "vocab": [["<pad>", 0.0]]}
    ),
  },
  prefix="tokenizer.json, ",
  match="tokenizer.json",
)


def _read_config(folder, content):
  (folder / "tokenizer_config.json").write_bytes(as_bytes(content))
  return _read(folder, _json())


_configs = BROKEN_JSON | {"eos_token without content": {"eos_token": {"a": 1}}}
_configs |= changed({}, {"pad_token": other_types("x")[1:]})
_name = "tokenizer_config.json"
FILES.add_table(_read_config, _configs, prefix=f"{_name}, ", match=_name)
_unknown = {"unknown tokens": {"pad_token": "[NONE]"}}
FILES.add_table(_read_config, _unknown, expects="used")


def _train(folder) -> bytes:
  """A small SentencePiece model."""
  file = folder / "spiece.model"
  tokenizer_parity.train_sentencepiece(file, vocab_size=60)
  return file.read_bytes()


def _read_pieces(folder, change):
  (folder / "x.model").write_bytes(change(_train(folder)))
  tokenizer = build_tokenizer(folder / "x.model")
  return read_record(folder, tokenizer=tokenizer)


def _export_pieces(folder, change):
  """Changes the message that a SentencePiece file contains."""
  proto = sentencepiece_model_pb2.ModelProto()

  def change_bytes(data):
    proto.ParseFromString(data)
    change(proto)
    return proto.SerializeToString()

  result = _read_pieces(folder, change_bytes)
  build_tokenizer(folder / "x.model").to_hf_tokenizer()
  return result


def _set(part, name, value):
  return lambda proto: setattr(getattr(proto, part), name, value)


_PIECES = {"prefix": "SentencePiece, "}
_HALF = {"half": BROKEN_BYTES["half"]}
_ALL_BROKEN = {k: v for k, v in BROKEN_BYTES.items() if k not in _HALF}
FILES.add_table(_read_pieces, _ALL_BROKEN, match="x.model", **_PIECES)
FILES.add_table(
  _read_pieces, DAMAGED_BYTES | _HALF, expects="error used skip", **_PIECES
)
FILES.add_table(
  _export_pieces, {"valid": lambda p: 0}, expects="used", **_PIECES
)
FILES.add_table(
  _export_pieces,
  {
    "without pieces": lambda p: p.ClearField("pieces"),
    "an eos_id beyond the pieces": _set("trainer_spec", "eos_id", 1 << 30),
    "an unk_id beyond the pieces": _set("trainer_spec", "unk_id", 1 << 30),
    "without an unknown piece": lambda p: p.pieces.__delitem__(0),
    "a repeated piece": lambda p: p.pieces.add(piece="a", score=0),
    "scores that are NaN": lambda p: setattr(p.pieces[3], "score", NAN),
    "a broken normalizer": _set(
      "normalizer_spec", "precompiled_charsmap", b"\xff" * 9
    ),
  },
  **_PIECES,
)


def _read_clip(folder, content):
  vocabulary, merges = content
  (folder / "vocab.json").write_bytes(as_bytes(vocabulary))
  (folder / "merges.txt").write_text(merges)
  return ClipTokenizer(folder).encode(["a"], 4).tolist()


_CLIP = {**foreign_samples.TOKENS, "a</w>": 5, "aa</w>": 4}
_NO_MERGES = "#version: 0.2\n"
FILES.add_table(
  _read_clip, {"valid": (_CLIP, _NO_MERGES)}, prefix="CLIP, ", expects="used"
)
FILES.add_table(
  _read_clip,
  {
    **{name: (data, _NO_MERGES) for name, data in BROKEN_JSON.items()},
    "without a start": ({"a": 0}, _NO_MERGES),
    "negative ids": (_CLIP | {"b": -1}, _NO_MERGES),
    "merges of one": (_CLIP, "a\n"),
    "merges of unknown tokens": (_CLIP, "y z\n"),
  },
  prefix="CLIP, ",
  match="vocab.json",
)


def _read_place(folder, name):
  os.mkfifo(folder / "pipe.json")
  os.mkdir(folder / "folder.model")
  return build_tokenizer(folder / name)


_places = ("pipe.json", "folder.model", "a\0.json", "\ud800.json")
FILES.add_table(_read_place, by_repr(_places))


# --- Texts -------------------------------------------------------------------


def _build(kind, folder):
  if kind in ("bytes", "words"):
    return build_tokenizer(kind)
  if kind == "sentencepiece":
    _train(folder)
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
  "50,000 words": "a " * 50_000,
  "noncharacters": "\ufffe\uffff\U0010ffff a",
  "combining marks": "e" + "\u0301" * 20_000,
  "special tokens": "<pad></s><unk>" * 100 + "a",
  "no words": "???",
}


def _encode(folder, case):
  kind, options = case
  return read_record(folder, tokenizer=_build(kind, folder), **options)


for _kind in ("bytes", "words", "sentencepiece", "bpe", "unigram", "wordpiece"):
  _texts = {name: (_kind, {"text": text}) for name, text in _ODD.items()}
  TEXTS.add_table(_encode, _texts, prefix=f"{_kind}, ", expects="used skip")
  _lone = (_kind, {"text": None, "json": {"caption": "a \ud800"}})
  TEXTS.add_table(
    _encode,
    {"a lone surrogate": _lone},
    prefix=f"{_kind}, ",
    expects="skip",
    match="h: ",
  )

test_tokenizers = run_all(FILES, TEXTS)
