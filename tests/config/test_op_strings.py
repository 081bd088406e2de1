"""The mini-language of ops."""

import pytest

from mtv_jax.config.op_strings import Op, build_op, parse_ops
from mtv_jax.config.options import PositiveInt
from mtv_jax.utils.errors import ConfigError, did_you_mean


def test_parse_ops():
  text = "decode|canvas(384)|caption(64, pick='a|b (c)')|x((0.1, -2), n=None)"
  assert parse_ops(text) == [
    Op("decode"),
    Op("canvas", (384,)),
    Op("caption", (64,), {"pick": "a|b (c)"}),
    Op("x", ((0.1, -2),), {"n": None}),
  ]
  assert parse_ops("  \n ") == []
  assert parse_ops(" flip\n | grey(0.2)") == [Op("flip"), Op("grey", (0.2,))]
  for text in ("caption(64, pick='first')", "flip"):
    assert str(parse_ops(text)[0]) == text
  assert len(parse_ops("flip|flip")) == 2
  with pytest.raises(ConfigError, match="repeat 'caption'"):
    parse_ops("decode|caption(8)|caption(16)", unique=True)


@pytest.mark.parametrize(
  ("text", "character", "why"),
  [
    ("flip||grey", 6, "invalid syntax"),
    ("flip|grey(0.2", 10, "never closed"),
    ("a('é', b)", 8, "literals"),
    ("crop(size=big)", 11, "literals"),
    ("  flip|x.y(1)", 8, "an op is a name"),
    ("flip|3", 6, "an op is a name"),
    ("f(**k)", 1, "not allowed"),
  ],
)
def test_bad_ops_say_where(text, character, why):
  with pytest.raises(ConfigError, match=why) as e:
    parse_ops(text)
  message, _, caret, *_ = str(e.value).split("\n")
  assert f"at character {character}:" in message
  assert caret.index("^") - 2 == character - 1


def test_build_op():
  def crop(size: PositiveInt, *, scale: float = 1.0):
    return size, scale

  registry = {"crop": crop, "decode": lambda: "decode"}
  built = build_op(Op("crop", (3,), {"scale": 1}), registry, "view op")
  assert built == (3, 1.0) and isinstance(built[1], float)
  for op, message in (
    (Op("crpo"), "view op 'crpo'. Did you mean 'crop'"),
    (Op("crop"), r"crop\(size: .*, scale: float = 1.0\)"),
    (Op("crop", (1,), {"x": 1}), "unexpected keyword argument 'x'"),
    (Op("crop", ("8",)), "view op crop.*size is '8', expected"),
    (Op("crop", (0,)), "size is 0, expected an integer >= 1"),
  ):
    with pytest.raises(ConfigError, match=message):
      build_op(op, registry, "view op")


def test_did_you_mean():
  names = ["weight_decay", "lr"]
  message = did_you_mean("weight_decy", names)
  assert message == "Did you mean 'weight_decay'? There are: lr, weight_decay."
  assert did_you_mean("zzz", ["a"]) == "There are: a."
  assert did_you_mean("zzz", []) == "There are none."
  many = [f"name{i}" for i in range(100)]
  message = did_you_mean("nam42", many, limit=3)
  assert "name42" in message
  assert message.endswith(" and 97 more.")
