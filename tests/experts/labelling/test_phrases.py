"""Phrase sources: n-grams, tags, vocabularies, functions."""

import logging

import pytest

from mtv_jax.data.records import BadRecord
from mtv_jax.experts.labelling import phrases
from mtv_jax.experts.labelling.phrases import build_phrases

CAPTIONS = [
  "A dog on the beach",
  "Stock photo: the DOG, running on the beach!",
  "it is what it is",
  "",
  "red_bicycle   &  blue bicycle -- free HD wallpapers",
]


def record(*captions, **meta):
  return {"key": "7", "captions": list(captions), "meta": meta}


def restated(captions, *, max_words, max_phrases):
  """OWLv2's recipe, a step at a time."""
  ngrams = []
  for caption in captions:
    plain = "".join(
      c for c in caption.replace("_", " ") if c not in PUNCTUATION
    )
    words = [w for w in plain.lower().split() if w not in phrases.GENERIC_WORDS]
    for i in range(len(words)):
      for n in range(1, max_words + 1):
        run = words[i : i + n]
        if len(run) == n and not set(run) <= phrases.STOP_WORDS:
          ngrams.append(" ".join(run))
  return list(dict.fromkeys(ngrams))[:max_phrases]


PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


@pytest.mark.parametrize("max_words", [1, 3, 10])
@pytest.mark.parametrize("max_phrases", [4, 300])
def test_ngrams_match_owlv2(max_words, max_phrases):
  limits = dict(max_words=max_words, max_phrases=max_phrases)
  source = build_phrases("ngrams", **limits)
  assert source(record(*CAPTIONS)) == restated(CAPTIONS, **limits)
  assert isinstance(source, phrases.Phrases)
  assert source.vocabulary is None


def test_ngrams_by_hand():
  source = build_phrases("ngrams")
  assert source(record("The dog, photo")) == ["the dog", "dog"]
  assert source(record("of the", "Don't", "images")) == []
  assert source(record()) == []
  long = record(" ".join(f"w{i}" for i in range(40)))
  assert len(source(long)) == phrases.MAX_PHRASES
  assert max(len(p.split()) for p in source(long)) == phrases.MAX_WORDS

  # The word lists are complete.
  assert len(phrases.GENERIC_WORDS) == 61
  # NLTK's 179; without its apostrophe, "it's" is "its".
  assert len(phrases.STOP_WORDS) == 178
  assert not phrases.GENERIC_WORDS & phrases.STOP_WORDS


@pytest.mark.parametrize(
  "written",
  [["Red  car", "tree", "red-car", "a.b"], "Red car; tree,|red car|ab"],
)
def test_tags_of_lists_and_strings(written):
  got = build_phrases("tags:objects")(record("unread", objects=written))
  assert got[:2] == ["Red car", "tree"]
  assert "red car" not in got
  assert len(build_phrases("tags", max_phrases=2)(record(tags=written))) == 2


def test_records_without_tags_have_no_phrases():
  source = build_phrases("tags")
  assert source(record("a caption")) == []
  assert source(record(tags=None)) == source(record(tags=[])) == []
  assert source.settings["field"] == "tags"
  # A lone surrogate, from a truncated JSON string.
  (phrase,) = source(record(tags=["dog \ud83d"]))
  assert phrase.encode() == b"dog ?"


@pytest.mark.parametrize("wrong", [3, {"a": 1}, ["a", 3]])
def test_invalid_tags_are_a_bad_record(wrong):
  with pytest.raises(BadRecord, match="'tags'.*string"):
    build_phrases("tags")(record(tags=wrong))


def test_a_vocabulary_is_closed(tmp_path, caplog):
  file = tmp_path / "names.txt"
  file.write_text("cat\n\n  traffic  light\nCat\ndog \n", encoding="utf-8")
  with caplog.at_level(logging.INFO):
    source = build_phrases(str(file), max_phrases=1)
  assert source.vocabulary == ("cat", "traffic light", "dog")
  assert source(record("whatever")) == ["cat", "traffic light", "dog"]
  assert "3 phrases; dropped 1 blank lines and 1 " in caplog.text
  settings = dict(source.settings)
  file.write_text("cat\ndog\ntraffic light\n", encoding="utf-8")
  assert build_phrases(str(file)).settings["hash"] != settings.pop("hash")
  assert settings == dict(source="vocabulary", file="names.txt", phrases=3)


def colours(record):
  return (f"{word} thing" for word in record["captions"][0].split())


def test_a_user_function():
  source = build_phrases(f"{__name__}:colours", max_phrases=2)
  assert source(record("red green blue")) == ["red thing", "green thing"]
  assert source.settings["source"].endswith(":colours")


@pytest.mark.parametrize(
  ("source", "limit", "message"),
  [
    ("ngram", 9, "Did you mean 'ngrams'"),
    ("ngrams", 0, "max_phrases is 0"),
    (f"{__name__}:colour", 9, "Did you mean 'colours'"),
    ("missing_module:function", 9, "PYTHONPATH"),
    (b"\n ,\n", 9, "2 lines but no phrase"),
    (b"\xff\xfe\x00\x81", 9, "UTF-8"),
  ],
)
def test_unknown_sources_and_limits(source, limit, message, tmp_path):
  if isinstance(source, bytes):
    (tmp_path / "names.txt").write_bytes(source)
    source = str(tmp_path / "names.txt")
  with pytest.raises(ValueError, match=message):
    build_phrases(source, max_phrases=limit)
