"""Hostile tokenizers of other programs."""

import json

from hostile import foreign_samples as samples
from hostile.harness import Cases

from mtv_jax.data import tokenizers
from mtv_jax.experts.owlv2.clip_tokenizer import ClipTokenizer

NAN = samples.NAN
TOKENIZERS = Cases(__file__, "tokenizers")


def _tokenizer(content, config=None, name="tokenizer.json"):
  def run(folder):
    data = content if isinstance(content, bytes) else json.dumps(content)
    data = data if isinstance(data, bytes) else data.encode()
    (folder / name).write_bytes(data)
    if config is not None:
      text = (
        config if isinstance(config, bytes) else json.dumps(config).encode()
      )
      (folder / "tokenizer_config.json").write_bytes(text)
    built = tokenizers.build_tokenizer(folder / name)
    return built.encode(["a a"], 4).tolist()

  return run


def _json(**changed):
  return {**samples.TOKENIZER, **changed}


def _model(**changed):
  return _json(model={**samples.TOKENIZER["model"], **changed})


TOKENIZERS.add("a valid tokenizer.json", _tokenizer(_json()), expects="used")
for _label, _content in {
  **samples.BROKEN,
  "without a model": _json(model=None),
  "an unknown model": _model(type="X"),
  "an empty vocabulary": _model(vocab={}),
  "a vocabulary of text": _model(vocab="x"),
  "negative ids": _model(vocab={"a": -1}),
  "ids beyond 32 bits": _model(vocab={"a": 1 << 40}),
  "ids of text": _model(vocab={"a": "b"}),
  "without a padding token": _model(vocab={"a": 0}),
  "an unknown normalizer": _json(normalizer={"type": "X"}),
  "a normalizer of text": _json(normalizer="x"),
  "a regex that is none": _json(
    pre_tokenizer={
      "type": "Split",
      "pattern": {"Regex": "(("},
      "behavior": "Isolated",
      "invert": False,
    }
  ),
  "a template of an unknown token": _json(
    post_processor={
      "type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
      "pair": [],
      "special_tokens": {},
    }
  ),
}.items():
  TOKENIZERS.add(
    f"tokenizer.json {_label}", _tokenizer(_content), match="tokenizer.json"
  )
for _label, _config_ in {
  **samples.BROKEN,
  "pad_token a number": {"pad_token": 3},
  "pad_token a list": {"pad_token": ["a"]},
  "eos_token without content": {"eos_token": {"a": 1}},
}.items():
  _run = _tokenizer(_json(), _config_)
  TOKENIZERS.add(
    f"tokenizer_config.json {_label}", _run, match="tokenizer_config.json"
  )
for _label, _data in {
  "empty": b"",
  "text": b"not a model",
  "binary": bytes(range(256)) * 10,
  "zeros": b"\0" * 1000,
  "a length of 2^60": b"\n\xff\xff\xff\xff\xff\xff\xff\xff\x0f",
}.items():
  _run = _tokenizer(_data, name="a.model")
  TOKENIZERS.add(f"a SentencePiece file {_label}", _run, match="a.model")


def _pieces(change):
  def run(folder):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    for i, name in enumerate(["<unk>", "<s>", "</s>", "\u2581a", "a"]):
      kind = {0: 2, 1: 3, 2: 3}.get(i, 1)
      proto.pieces.add(piece=name, score=-i, type=kind)
    change(proto)
    (folder / "a.model").write_bytes(proto.SerializeToString())
    built = tokenizers.build_tokenizer(folder / "a.model")
    built.to_model()
    return built.encode(["a a"], 4).tolist()

  return run


TOKENIZERS.add("SentencePiece: valid", _pieces(lambda p: 0), expects="used")
for _label, _change in {
  "without pieces": lambda p: p.ClearField("pieces"),
  "an eos_id beyond the pieces": lambda p: setattr(
    p.trainer_spec, "eos_id", 1 << 30
  ),
  "an unk_id beyond the pieces": lambda p: setattr(
    p.trainer_spec, "unk_id", 1 << 30
  ),
  "without an unknown piece": lambda p: p.pieces.__delitem__(0),
  "a repeated piece": lambda p: p.pieces.add(piece="a", score=0),
  "scores that are NaN": lambda p: setattr(p.pieces[3], "score", NAN),
  "a broken normalizer": lambda p: setattr(
    p.normalizer_spec, "precompiled_charsmap", b"\xff" * 9
  ),
}.items():
  TOKENIZERS.add(f"SentencePiece: {_label}", _pieces(_change))


def _clip_files(vocabulary, merges="#version: 0.2\n"):
  def run(folder):
    (folder / "vocab.json").write_text(vocabulary)
    (folder / "merges.txt").write_text(merges)
    return ClipTokenizer(folder).encode(["a"], 4).tolist()

  return run


_VOCABULARY = json.dumps({**samples.TOKENS, "a</w>": 5, "aa</w>": 4})
TOKENIZERS.add("CLIP: valid", _clip_files(_VOCABULARY), expects="used")
for _label, _arguments in {
  "no JSON": ("{",),
  "nested deep": ('{"a":' * 100_000,),
  "a list": ("[1]",),
  "without a start": ('{"a": 0}',),
  "ids of text": (json.dumps({**samples.TOKENS, "b": "x"}),),
  "negative ids": (json.dumps({**samples.TOKENS, "b": -1}),),
  "merges of one": (_VOCABULARY, "a\n"),
  "merges of three": (_VOCABULARY, "a a a\n"),
  "merges of unknown tokens": (_VOCABULARY, "y z\n"),
}.items():
  TOKENIZERS.add(
    f"CLIP: {_label}", _clip_files(*_arguments), match="vocab.json"
  )


@TOKENIZERS.parametrize
def test_tokenizers(case, hostile):
  hostile(case)
