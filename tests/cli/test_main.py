"""`mtv-jax`: dispatch, shared arguments, errors, and the installed wheel."""

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from concurrent import futures
from typing import Annotated, Literal

import pytest
import trainings

from mtv_jax.cli import arguments, errors, main


@pytest.mark.parametrize("name", [None, *main.COMMANDS])
def test_every_command_has_help(name, capsys):
  with pytest.raises(SystemExit) as exit:
    main.main([*filter(None, [name]), "--help"])
  assert exit.value.code == 0
  text = capsys.readouterr().out
  if name is None:
    assert "bench" not in text and "  train " in text
    with pytest.raises(SystemExit):
      main.main(["--help", "--all"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in main.COMMANDS)
  else:
    assert text.startswith(f"usage: mtv-jax {name}") and "--debug" in text


def test_a_caller_keeps_its_handler_of_interrupts(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["mtv-jax", "--help"])

  def call():
    for argv in (None, ["--help"]):
      with pytest.raises(SystemExit, match="0"):
        main.main(argv)

  default = signal.default_int_handler
  previous = signal.signal(signal.SIGINT, default)
  try:
    call()
    assert signal.getsignal(signal.SIGINT) is default
    with futures.ThreadPoolExecutor() as pool:
      pool.submit(call).result()
  finally:
    signal.signal(signal.SIGINT, previous)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.4, 0.8, 1.6])
def test_an_interrupt_during_imports_ends_the_process(tmp_path, delay):
  """JAX's callback of the garbage collector swallows exceptions."""
  process = trainings.launch(tmp_path / "run", "--dry_run")
  deadline = time.monotonic() + 60
  while "train: starting" not in trainings.log(tmp_path / "run"):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  time.sleep(delay)
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=60) in (-signal.SIGINT, 130)
  assert "Traceback" not in trainings.log(tmp_path / "run")


_TRAIN = "train --config=mtv_tiny:tiny --workdir=x"


@pytest.mark.parametrize(
  ("command", "message"),
  [
    ("trian", "invalid choice: 'trian'. Did you mean 'train'?"),
    (
      "make_prompts --output=a --outptu=b c",
      "unrecognized arguments: --outptu=b c (did you mean --output?)",
    ),
    (f"{_TRAIN} --data=x", "--data=x is an argument of the recipe: --config=R"),
    (f"{_TRAIN} --process=0", "train: --coordinator, --processes"),
    (f"{_TRAIN} --connect_seconds=0", "'0': expected an integer of at least 1"),
    (f"{_TRAIN} --connect_seconds=1m", "'1m': expected an integer of at le"),
  ],
)
def test_wrong_command_lines_exit_with_a_message(command, message, capsys):
  with pytest.raises(SystemExit) as exit:
    main.main(command.split())
  text = capsys.readouterr().err if exit.value.code == 2 else exit.value.code
  assert message in text


def test_hyphens_in_options_are_underscores(tmp_path):
  assert main._normalize(["--batch-size=3", "--a-b", "-x", "c-d"]) == [
    "--batch_size=3", "--a_b", "-x", "c-d",
  ]  # fmt: skip
  assert main._normalize(["--config.optim.lr=1e-3", "--set=a-b=--c-d"]) == [
    "--set=optim.lr=1e-3", "--set=a-b=--c-d",
  ]  # fmt: skip


def test_user_errors_are_one_message_and_debug_shows_the_traceback():
  argv = ["evaluate", "--encoder=pixels:16", "--evals=retreival"]
  with pytest.raises(SystemExit, match="^evaluate: .*Did you mean 'retrieval"):
    main.main(argv)
  with pytest.raises(errors.UserError, match="Did you mean 'retrieval"):
    main.main([*argv, "--debug"])


class Group(arguments.Flags):
  """Flags of several commands.

  Args:
    size: of a side.
    most: at least none.
  """

  size: float | None = None
  most: Annotated[int, 0] = 5


class Derived(Group):
  """More of them.

  Args:
    set: KEY=VALUE.
  """

  set: list[str] = ()


def echo(
  files: Sequence[str],
  /,
  name: str,
  group: Derived,
  *,
  count: int = 3,
  workers: int = 0,
  rows: Sequence[int] = (),
  kind: Literal["a", "b"] = "a",
  quick: bool = False,
) -> dict:
  """Returns its arguments.

  Args:
    files: to read.
    name: of the
      items, 100 %.
    count: how many.
    workers: processes.
    rows: of a table.
    kind: of the items.
    quick: or not.

  Raises:
    ValueError: never.
  """
  return locals()


def test_flags_follow_the_signature_and_docstring():
  parser = argparse.ArgumentParser()
  arguments.add_parameters(parser, echo)
  text = " ".join(parser.format_help().split())
  assert "of the items, 100 %." in text
  assert "of a side." in text and "KEY=VALUE." in text
  default = dict(
    files=["x"], name="a", count=3, workers=0, rows=[], kind="a", quick=False,
    group=Derived(size=None, most=5, set=[]),
  )  # fmt: skip
  for line, changes in (
    ("", {}),
    ("--workers=0 --quick --kind=b", dict(quick=True, kind="b")),
    ("--rows 1 2", dict(rows=[1, 2])),
    ("--most=0 --set=a --set=b --size=2",
     dict(group=Derived(size=2.0, most=0, set=["a", "b"]))),
  ):  # fmt: skip
    args = parser.parse_args(["x", "--name=a", *line.split()])
    assert arguments.call(echo, args) == default | changes
  for wrong in ("x --name=a --count=0", "x --count=1", "--name=a",
                "x --name=a --kind=c", "x --name=a --most=-1"):  # fmt: skip
    with pytest.raises(SystemExit):
      parser.parse_args(wrong.split())


PACKAGED = (
  "mtv_jax", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE",
  "MANIFEST.in",
)  # fmt: skip


@pytest.mark.slow
def test_the_wheel_works_alone(tmp_path, repo_root):
  """An empty environment trains, evaluates and exports from another folder.

  The environment has this one's dependencies, and the wheel instead of
  the checkout.
  """
  source = tmp_path / "source"
  tracked = subprocess.run(
    ["git", "ls-files", "-z"], cwd=repo_root, capture_output=True, check=True
  ).stdout.decode()
  for name in filter(None, tracked.split("\0")):
    if name.partition("/")[0] in PACKAGED:
      copy = source / name
      copy.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(repo_root / name, copy, follow_symlinks=False)
  # From the sdist, as releases are.
  pip, backend = [sys.executable, "-m", "pip"], tmp_path / "backend"
  subprocess.run(
    [*pip, "install", "--quiet", f"--target={backend}", "setuptools>=77"],
    check=True,
  )
  code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
  subprocess.run(
    [sys.executable, "-c", code], cwd=source, check=True, capture_output=True,
    env={**os.environ, "PYTHONPATH": str(backend)},
  )  # fmt: skip
  (sdist,) = tmp_path.glob("*.tar.gz")
  subprocess.run(
    [*pip, "wheel", "--quiet", "--no-deps", f"--wheel-dir={tmp_path}", sdist],
    check=True,
  )
  (wheel,) = tmp_path.glob("*.whl")
  site = tmp_path / "site"
  zipfile.ZipFile(wheel).extractall(site)
  assert (site / "mtv_jax" / "py.typed").is_file()
  assert not (site / "mtv_jax" / "configs").is_symlink()
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()

  def run(*argv):
    code = (
      f"import sys; sys.path.insert(0, {str(site)!r}); import mtv_jax;"
      f"assert mtv_jax.__file__.startswith({str(site)!r});"
      "from mtv_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    subprocess.run(
      [sys.executable, "-c", code, *argv], check=True, cwd=elsewhere,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""},
    )  # fmt: skip

  run("train", "--config=siglip_b16_224:tiny,batch=8", "--workdir=run",
      "--config.total_steps=2")  # fmt: skip
  run("evaluate", "--encoder=run", "--evals=retrieval", "--count=8",
      "--json=figures.json")  # fmt: skip
  run("convert", "to_hf", "run", "export")
  names = {path.name for path in pathlib.Path(elsewhere).iterdir()}
  assert names == {"run", "figures.json", "export"}
  assert "<svg" in (elsewhere / "run" / "report.html").read_text()
  command = (elsewhere / "run" / "command.txt").read_text()
  assert command == (
    "mtv-jax train --config=siglip_b16_224:tiny,batch=8 "
    "--config.total_steps=2 --workdir=run\n"
  )
  assert (elsewhere / "export" / "model.safetensors").is_file()
