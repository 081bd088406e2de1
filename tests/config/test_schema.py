"""Durations, typed arguments, the schema and the mini-language of ops."""

import copy
import json
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from mtv_jax.config import schema
from mtv_jax.config.op_strings import Op, build_op, parse_ops
from mtv_jax.config.options import PositiveInt
from mtv_jax.config.schema import RunLength
from mtv_jax.utils.errors import ConfigError, did_you_mean

SMALL = {
  "batch_size": 8,
  "total_steps": 10,
  "data": {"train": [{"type": "scenes"}], "ops": "decode|canvas(32)"},
  "views": {"image": {"ops": "resize(32)"}},
  "objectives": {"contrastive": {}},
  "optim": {"lr": 1e-3},
}


def small(**changes):
  """SMALL with changes such as optim__lr=1."""
  config = copy.deepcopy(SMALL)
  for path, value in changes.items():
    *parents, last = path.split("__")
    section = config
    for parent in parents:
      section = section.setdefault(parent, {})
    section[last] = value
  return config


def test_config_imports_no_jax():
  code = (
    "import sys, mtv_jax.config.schema;"
    "sys.exit(any(m in sys.modules for m in ('jax', 'flax', 'tensorflow')))"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- ops ---------------------------------------------------------------------


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


def test_op_prints_as_it_is_written():
  text = "caption(64, pick='first')"
  assert str(parse_ops(text)[0]) == text
  assert str(Op("flip")) == "flip"


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
  def canvas(size, *, background=0):
    return size, background

  registry = {"canvas": canvas, "decode": lambda: "decode"}
  op = Op("canvas", (3,), {"background": 1})
  assert build_op(op, registry, "data op") == (3, 1)
  with pytest.raises(ConfigError, match="data op 'canvs'. Did you mean 'canv"):
    build_op(Op("canvs"), registry, "data op")
  with pytest.raises(ConfigError, match=r"canvas\(size, background=0\)"):
    build_op(Op("canvas"), registry, "data op")
  with pytest.raises(ConfigError, match="unexpected keyword argument 'x'"):
    build_op(Op("canvas", (1,), {"x": 1}), registry, "data op")


def test_op_arguments_are_checked_by_their_annotations():
  def crop(size: PositiveInt, scale: float = 1.0):
    return size, scale

  registry = {"crop": crop}
  assert build_op(Op("crop", (8, 1)), registry, "view op") == (8, 1.0)
  with pytest.raises(ConfigError, match="view op crop.*size is '8', expected"):
    build_op(Op("crop", ("8",)), registry, "view op")
  with pytest.raises(ConfigError, match="size is 0, expected an integer >= 1"):
    build_op(Op("crop", (0,)), registry, "view op")


def test_repeated_ops_are_rejected_where_names_are_unique():
  assert len(parse_ops("flip|flip")) == 2
  with pytest.raises(ConfigError, match="repeat 'caption'"):
    parse_ops("decode|caption(8)|caption(16)", unique=True)


def test_did_you_mean():
  names = ["weight_decay", "lr"]
  message = did_you_mean("weight_decy", names)
  assert message == "Did you mean 'weight_decay'? There are: lr, weight_decay."
  assert did_you_mean("zzz", ["a"]) == "There are: a."
  assert did_you_mean("zzz", []) == "There are none."
  many = [f"name{i}" for i in range(100)]
  message = did_you_mean("nam42", many, limit=3)
  assert "name42" in message
  assert message.endswith("(97 more).")


# --- durations ---------------------------------------------------------------

RUN = RunLength(batch_size=64, examples_per_epoch=313, total_steps=2000)


@pytest.mark.parametrize(
  ("key", "value", "expected"),
  [
    ("warmup_steps", 7, 7),
    ("warmup_steps", 0, 0),
    ("warmup_epochs", 1, 5),  # 313 / 64 = 4.89
    ("warmup_epochs", 2.5, 12),  # 12.2
    ("warmup_epochs", 1e-9, 1),  # Asked for, so not nothing.
    ("warmup_examples", 6400, 100),
    ("warmup_percent", 10, 200),
    ("warmup_percent", 0, 0),
  ],
)
def test_steps(key, value, expected):
  for config in ({key: value}, ConfigDict({key: value, "warmup_x": None})):
    assert RUN.steps("warmup", config) == expected


def test_steps_errors():
  both = {"warmup_steps": 1, "warmup_percent": 1}
  with pytest.raises(ConfigError, match="got warmup_steps=1, warmup_percent=1"):
    RUN.steps("warmup", both)
  with pytest.raises(ConfigError, match="exactly one of warmup_steps.*none"):
    RUN.steps("warmup", {})
  assert RUN.steps("warmup", {}, default=None) is None
  for value in (-1, 1.5, "10", True):
    with pytest.raises(ConfigError, match="warmup_steps is"):
      RUN.steps("warmup", {"warmup_steps": value})
  with pytest.raises(ConfigError, match="no known length"):
    RunLength(8).steps("warmup", {"warmup_epochs": 1})
  with pytest.raises(ConfigError, match="needs a run of known length"):
    RunLength(8).steps("warmup", {"warmup_percent": 1})


def test_total_steps():
  config = {"batch_size": 64, "total_epochs": 10}
  assert RunLength.from_config(config, 313).total_steps == 49
  with pytest.raises(ConfigError, match="total_epochs: this data has no known"):
    RunLength.from_config(config)


# --- arguments ---------------------------------------------------------------


def test_parse_arg():
  defaults = {"tiny": False, "batch": 8, "lr": 1.0, "path": "a", "any": None}
  parse = schema.parse_arg
  assert parse(None, **defaults).to_dict() == defaults
  got = parse("tiny, batch=64,lr=1,path=3,any=x", **defaults)
  assert got.to_dict() == {
    "tiny": True,
    "batch": 64,
    "lr": 1.0,
    "path": "3",
    "any": "x",
  }
  assert isinstance(got.lr, float)
  assert parse("tiny=false", tiny=True).tiny is False
  with pytest.raises(ConfigError, match="'tinny'. Did you mean 'tiny'"):
    parse("tinny", **defaults)
  with pytest.raises(ConfigError, match="'batch' needs a value"):
    parse("batch", **defaults)
  with pytest.raises(ConfigError, match="a='foo'; expected a list"):
    parse("a=foo", a=(1, 2))
  for bad in ("batch=x", "batch=1.5", "batch=True", "tiny=1"):
    with pytest.raises(ConfigError, match="expected"):
      parse(bad, **defaults)


# --- the schema --------------------------------------------------------------


def test_check_fills_in_defaults_and_settles():
  config = schema.check_config(ConfigDict(small(evals__zero_shot={"topk": 5})))
  assert config.optim.name == "adamw"
  assert config.schedule.warmup_steps == 0
  axes = {"data": -1, "fsdp": 1, "tensor": 1}
  assert config.mesh.to_dict() == {**axes, "dcn": axes}
  assert config.objectives.contrastive.to_dict() == {
    "type": "contrastive",
    "weight": 1.0,
  }
  assert config.evals.zero_shot.to_dict() == {"type": "zero_shot", "topk": 5}
  assert config.ema is None and config.model.text is None
  assert schema.check_config(config).to_dict() == config.to_dict()
  # The same after a round trip through config.json.
  again = schema.check_config(json.loads(json.dumps(config.to_dict())))
  assert json.dumps(again.to_dict()) == json.dumps(config.to_dict())


def test_check_keeps_given_values_and_units():
  config = small(
    schedule={"warmup_percent": 5},
    optim__rules=[("x", {"lr": 0})],
    model__text={"vocab_size": 258},
    model__registers=4,
    evals={"a": None, "b": {"every_epochs": 1}},
  )
  del config["total_steps"]
  config["total_epochs"] = 3
  before = copy.deepcopy(config)
  got = schema.check_config(config)
  assert got.schedule.warmup_percent == 5
  assert "warmup_steps" not in got.schedule
  assert "total_steps" not in got and got.total_epochs == 3
  assert got.optim.rules == [("x", {"lr": 0})]
  assert got.model.text.vocab_size == 258 and got.model.text.variant == "B"
  assert got.model.registers == 4
  assert list(got.evals) == ["b"]
  assert config == before


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bach_size": 1}, "config.bach_size.*Did you mean 'batch_size'"),
    ({"checkpoint__every_epoch": 1}, "Did you mean 'every_epochs'"),
    ({"data__shufle": "none"}, "config.data.shufle"),
    ({"batch_size": None}, "config.batch_size is missing"),
    ({"log__profile_steps": (5, 3)}, r"profile_steps is \(5, 3\), expected"),
    ({"batch_size": "8"}, "config.batch_size is '8', expected an int"),
    ({"batch_size": True}, "config.batch_size is True"),
    ({"batch_size": 0}, "config.batch_size is 0, expected an integer >= 1"),
    (
      {"seed": -1},
      "config.seed is -1, expected an.*<= 4294967295",
    ),
    (
      {"objectives__contrastive": {"weight": -1.0}},
      "config.objectives.contrastive.weight is -1.0, expected a number >= 0",
    ),
    ({"optim__lr": -1.0}, "config.optim.lr is -1.0, expected a number >= 0"),
    (
      {"optim__lr": float("nan")},
      "config.optim.lr is nan, expected a num",
    ),
    (
      {"optim__lr": float("inf")},
      "config.optim.lr is inf, expected a num",
    ),
    (
      {"ema": {"decay": 1.5}},
      "config.ema.decay is 1.5, expected a num",
    ),
    ({"data__max_corrupt": 5.0}, "config.data.max_corrupt is 5.0, expected a"),
    ({"total_steps": 0}, "config.total_steps is 0, expected a number > 0"),
    (
      {"log": {"every_steps": 0}},
      "config.log.every_steps is 0, expected a number > 0",
    ),
    (
      {"checkpoint": {"every_epochs": 0}},
      "every_epochs is 0, expected a num",
    ),
    (
      {"schedule": {"warmup_steps": -2}},
      "warmup_steps is -2, expected a num",
    ),
    ({"checkpoint__keep": 0}, "config.checkpoint.keep is 0"),
    ({"total_epochs": 3}, "got total_steps=10, total_epochs=3"),
    ({"total_steps": None}, "exactly one of total_steps.*got none"),
    ({"total_percent": 3}, "config.total_percent is an unknown key"),
    ({"total_steps": "3"}, "config.total_steps is '3'"),
    ({"optim": 3}, "config.optim is 3, expected a section"),
    ({"optim__lr": None}, "config.optim.lr is missing"),
    ({"views__image": {}}, "config.views.image.ops is missing"),
    ({"views__image": "flip"}, "config.views.image is 'flip'"),
    ({"views": [1]}, "config.views is"),
    ({"data__train": []}, "config.data.train is empty"),
    ({"data__train": ["a"]}, r"config.data.train\[0\] is 'a'"),
    ({"data__train": [{}]}, r"config.data.train\[0\]"),
    ({"evals": {"a/b": {"type": "retrieval"}}}, "evals has an entry 'a/b'"),
  ],
)
def test_check_errors(changes, message):
  with pytest.raises(ConfigError, match=message):
    schema.check_config(small(**changes))
