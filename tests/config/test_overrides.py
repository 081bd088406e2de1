"""Overrides from a command line, and how a program ends on an error."""

import copy
import math
import re

import pytest
import trainings
from ml_collections import ConfigDict

from mtv_jax.cli import errors
from mtv_jax.cli.main import run_command
from mtv_jax.config import overrides
from mtv_jax.data.canvas import decode
from mtv_jax.train.config import resolve
from mtv_jax.utils.errors import ConfigError

SMALL = {
  "batch_size": 8,
  "total_steps": 10,
  "data": {
    "train": [{"type": "scenes"}, {"type": "scenes", "weight": 0.5}],
    "ops": "decode|canvas(32)",
  },
  "views": {"image": {"ops": "resize(32)"}},
  "objectives": {"contrastive": {"weight": 1.0}},
  "optim": {"lr": 1e-3, "rules": (("bias", {"lr": 0.1}),)},
  "evals": {"retrieval": {"count": 24, "every_percent": 5}},
}


def apply(*assignments):
  config = ConfigDict(copy.deepcopy(SMALL))
  return overrides.override(config, assignments)


def test_command_line_overrides_become_assignments():
  got = overrides.from_flags(
    ["main.py", "--config.optim.lr=1e-3", "--workdir=a", "--config.seed", "3",
     "--config=c.py:tiny", "-config.data.ops=decode|canvas(8, x=1)"]
  )  # fmt: skip
  assert got == [
    "main.py", "--set=optim.lr=1e-3", "--workdir=a", "--set=seed=3",
    "--config=c.py:tiny", "--set=data.ops=decode|canvas(8, x=1)",
  ]  # fmt: skip
  with pytest.raises(ConfigError, match="--config.seed has no value"):
    overrides.from_flags(["--config.seed", "--workdir=a"])


@pytest.mark.parametrize(
  ("assignment", "expected"),
  [
    ("batch_size=16", 16),
    ("optim.lr=2", 2.0),
    ("optim.lr=1e-4", 1e-4),
    # Integers in the file; the schema takes any number.
    ("evals.retrieval.every_percent=2.5", 2.5),
    ("total_steps=1.5e3", 1500.0),
    ("data.train[1].weight=2", 2.0),
    ("data.train[0].path=/a/{00..09}.tar", "/a/{00..09}.tar"),
    ("data.ops=decode", "decode"),
    # Keys that the file leaves out, some in sections that it leaves out.
    ("data.max_corrupt=0.5", 0.5),
    ("mesh.fsdp=2", 2),
    ("model.text.tokenizer=a/b.model", "a/b.model"),
    ("model.scan=False", False),
    ("model.scan=true", True),
    ("optim.rules=[('bias', {'lr': 0.0})]", [("bias", {"lr": 0.0})]),
    ("objectives.contrastive.weight={'value': 2.0}", {"value": 2.0}),
    ("evals.retrieval=none", None),
    ("schedule.name=None", None),
    ("schedule.name=none", "none"),
    ("init=none", "none"),
    ("init=None", None),
  ],
)
def test_override(assignment, expected):
  node = apply(assignment)
  for part in re.findall(r"\w+", assignment.split("=")[0]):
    node = node[int(part)] if part.isdigit() else node[part]
  node = node.to_dict() if isinstance(node, ConfigDict) else node
  assert node == expected
  assert type(node) is type(expected)


@pytest.mark.parametrize(
  ("assignment", "expected"),
  [
    (
      "data.train=[dict(type='parquet', labels=dict(depth='b'))]",
      [{"type": "parquet", "labels": {"depth": "b"}}],
    ),
    ("data.train[1]=dict(path='a')", [{"type": "scenes"}, {"path": "a"}]),
    ("data.train=[{'type': 'tfds', 'n': -1}]", [{"type": "tfds", "n": -1}]),
  ],
)
def test_sources_can_be_replaced_by_dict_calls(assignment, expected):
  train = apply(assignment).to_dict()["data"]["train"]
  assert [dict(entry) for entry in train] == expected
  # No other function may be called.
  for text in ("[open('a')]", "dict(1)"):
    assert apply(f"data.new={text}").data.new == text


def test_overrides_of_what_a_file_leaves_out_reach_the_checked_config():
  checked = resolve(
    apply("data.max_corrupt=0.5", "mesh.fsdp=2", "evals.retrieval=none")
  )
  assert checked.data.max_corrupt == 0.5 and not checked.evals
  mesh = checked.mesh
  assert (mesh.data, mesh.fsdp, mesh.tensor) == (-1, 2, 1)


@pytest.mark.parametrize(
  ("assignment", "match"),
  [
    ("batch_size=many", "config.batch_size=many: expected int, such as 8"),
    ("optim.lr=fast", "config.optim.lr=fast: expected float"),
    ("evals.retrieval.count=all", "count=all: expected int, such as 24"),
    ("optim=3", "config.optim=3: this is a section.*There are: lr, rules"),
    ("seed.x=3", "config.seed"),
    ("batch_size=8.5", "config.batch_size"),
    ("batch_size.x=3", "config.batch_size is 8, not a section"),
    ("data.train[2].size=3", r"config.data.train has 2 entries.*no \[2\]"),
    ("data.ops[0]=3", "config.data.ops is 'decode.*not a list"),
    ("mesh[0]=3", "config.mesh is|config.mesh has|not a list"),
    ("data..ops=3", "'data..ops' is not a key"),
    (
      "evals={'a.b': dict(count=3)}",
      r"config.evals={'a.b.*does not accept dots",
    ),
    ("data.train[-1].size=3", "is not a key"),
    ("batch_size", "config.batch_size"),
    ("__class__.x=3", "config.__class__"),
    ("data.__init__=3", "config.data.__init__"),
    ("batchsize=3", "config.batchsize is an unknown key. Did you mean 'batch_"),
    ("log.evry=3", "config.log.evry is an unknown key"),
    ("mesh.dta=2", "config.mesh.dta is an unknown key. Did you mean 'data'"),
    ("data.worker=2", "config.data.worker is an unknown key"),
  ],
)
def test_bad_overrides_name_the_key(assignment, match):
  with pytest.raises(ConfigError, match=match):
    resolve(apply(assignment))


def end(function, *arguments):
  """The exception by which a command ends."""
  ends = (SystemExit, ValueError, TypeError)
  with pytest.raises(ends) as ending, errors.readable_errors("train"):
    function(*arguments)
  return ending.value


def interrupt():
  raise KeyboardInterrupt


def test_errors_exit_with_their_message(capsys, tmp_path):
  ending = end(resolve, {})
  text = "train: config.batch_size is missing; it has no default."
  assert ending.code == 2 and str(ending) == text
  assert capsys.readouterr().err == f"{text}\n"
  assert "record 'image'" in end(decode, b"no image").code
  (tmp_path / "file").touch()
  assert "file" in end((tmp_path / "file" / "below").mkdir).code
  assert end(interrupt).code == 130
  assert capsys.readouterr().err == "\ntrain: interrupted.\n"
  # Defects keep their traceback.
  assert isinstance(end(math.log, 0), ValueError)
  assert isinstance(end(len, 3), TypeError)


def test_a_message_has_the_notes():
  error = ConfigError("wrong")
  error.add_note("(in evaluation 'a')")
  error.add_note("For simplicity, JAX ... Set JAX_TRACEBACK_FILTERING=off ...")
  error.add_note("--\nGrain ... --grain_py_traceback_filtering=off ...")
  assert errors.format_error(error) == "wrong\n(in evaluation 'a')"


def test_the_training_command_prints_one_message(tmp_path, capsys):
  flags = f"--config={trainings.CONFIG}", f"--workdir={tmp_path / 'run'}"
  with pytest.raises(SystemExit) as ending:
    run_command("train", [*flags, "--config.data.max_corupt=0.5"])
  assert ending.value.code == 2
  message = "config.data.max_corupt is an unknown key. Did you mean 'max_corr"
  text = capsys.readouterr().err
  assert text.splitlines()[-1].startswith(f"train: {message}")
  assert "Traceback" not in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["step", "--config=nowhere.py"], "bench: there is no config 'nowhere.py'"),
    (["data", "--data=nowhere/*.tar"], "bench: 'nowhere/[*].tar' matches no"),
    (["data", "--tokenizer=x.model"], "bench: tokenizer='x.model': there is"),
  ],
)
def test_bench_prints_one_message(arguments, message):
  with pytest.raises(SystemExit, match=message):
    run_command("bench", arguments)


def test_the_bench_takes_no_zeros(capsys):
  with pytest.raises(SystemExit):
    run_command("bench", ["data", "--batch_size=0"])
  assert "--batch_size: '0': expected an integer" in capsys.readouterr().err
