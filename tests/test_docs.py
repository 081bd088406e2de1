"""Commands, options, files and links in README and docs/ exist."""

import importlib
import re
import shutil
import subprocess
import sys

import doc_commands
import pytest
from doc_commands import ROOT

from mtv_jax.cli import bench, main
from mtv_jax.cli.arguments import ConfigFlags, read_config
from mtv_jax.cli.main import COMMANDS, run_command
from mtv_jax.train.config import resolve

PAGES = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
  *sorted((ROOT / "docs").glob("*.md")),
]
SOURCES = sorted(
  path
  for folder in ("mtv_jax", "configs", "tools")
  for path in (ROOT / folder).rglob("*.py")
)
# `mtv-jax COMMAND ... --option`, or the script, over several lines.
_COMMAND = re.compile(
  r"(?:mtv-jax |python tools/|python -m mtv_jax\.)(\w+)(?:\.py)?"
  r"((?:[^`\n]|\\\n)*)"
)
_OPTION = re.compile(r"--(\w[\w-]*)")
_SUBCOMMANDS = {
  "bench": bench.COMMANDS,
  "convert": ("to_hf", "to_onnx", "to_stablehlo", "from_hf", "from_big_vision"),
  "make_labels": ("boxes", "depth"),
}


def written():
  for path in [*PAGES, *SOURCES]:
    yield path, path.read_text(encoding="utf-8")


def commands():
  found = {}
  for path, text in written():
    # The text after ` -- ` is a separate command.
    for name, arguments in _COMMAND.findall(text.replace(" -- ", "\n")):
      name = "train" if name == "main" else name
      if name not in COMMANDS:
        continue
      options = found.setdefault(name, {})
      for option in _OPTION.findall(arguments):
        options.setdefault(option, path.relative_to(ROOT))
  return found


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_of_a_command_exists(name, capsys):
  known = {"config"}
  for subcommand in (None, *_SUBCOMMANDS.get(name, ())):
    with pytest.raises(SystemExit):
      run_command(name, [*filter(None, [subcommand]), "--help"])
    known |= set(_OPTION.findall(capsys.readouterr().out))
  for option, where in commands()[name].items():
    assert option in known, f"{where}: mtv-jax {name} has no --{option}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return doc_commands.write_model(tmp_path_factory.mktemp("model") / "model")


# Where the pages have models and runs of the reader, a small model is read.
_MODELS = re.compile(
  r"/data/(siglip|dinov2_98)\b|google/siglip-base-patch16-224|runs/start_hf"
  r"|studies/\w+/runs/(vl|ssl)-s[05]|studies/questions/lm_\w+|^FOLDER$"
)
_LANGUAGE_MODEL = re.compile(r"language_model=studies/\w+/lm,")


@pytest.mark.parametrize("page", doc_commands.PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_accepted(
  page, model, tmp_path, monkeypatch
):
  """Arguments are parsed and configs resolved; nothing runs."""
  monkeypatch.chdir(tmp_path)
  for name, *words in doc_commands.read_commands(page, tmp_path):
    if name == "--help":
      continue
    words = [_LANGUAGE_MODEL.sub("", word) for word in words]
    words = [_MODELS.sub(str(model), word) for word in words]
    module, function = main.find_function(name)
    module = importlib.import_module(module)
    args = main.parse(name, module, words, function=function)
    if recipe := getattr(args, "config", None):
      config = read_config(ConfigFlags(config=recipe, set=args.set))
      resolve(config, reads_files=False)


def test_every_command_is_documented():
  assert set(commands()) == set(COMMANDS)


def test_every_file_that_is_named_exists():
  named = re.compile(
    r"(?<![\w/])((?:configs|tools|docs|tests)/[\w/]+\.(?:py|md))\b"
  )
  for path, text in written():
    for name in named.findall(text):
      assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}"


def test_every_link_within_the_pages_leads_somewhere():
  link = re.compile(r"\]\((?!https?:)([^)#\s]+)")
  for page in PAGES:
    for target in link.findall(page.read_text(encoding="utf-8")):
      where = f"{page.relative_to(ROOT)} links to {target}"
      assert (page.parent / target).exists(), where


def test_every_target_of_make_exists():
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
      assert target in targets, f"{page.name}: make {target}"


def test_the_files_of_a_question_have_the_names_beside_them():
  page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
  for row in page.partition("## Where to look")[2].splitlines():
    files = re.findall(r"`([\w/]+\.py)`", row)
    paths = [ROOT / "mtv_jax" / file for file in files]
    words = {w for p in paths for w in re.findall(r"\w+", p.read_text("utf-8"))}
    for name in {*re.findall(r"`([\w.]+)`", row)} - {*files}:
      assert {*name.split(".")} <= words, f"{name} is not in {files}"


def test_python_in_the_pages_is_python():
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
      compile(block, page.name, "exec")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
  """Its photos are built-in scenes, since the folder has none."""
  code = doc_commands.read_notebook(ROOT / "notebooks" / "first_run.ipynb")
  assert 'STEPS = "siglip_b16_224:tiny", 100' in code
  code = code.replace('tiny", 100', 'tiny", 4')
  (tmp_path / "notebook.py").write_text(code, encoding="utf-8")
  done = subprocess.run(
    [sys.executable, "notebook.py"], cwd=tmp_path, text=True,
    env=doc_commands.write_program(tmp_path / "bin"), capture_output=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-4000:]
  assert "<svg" in done.stdout and "0000.jpg -> " in done.stdout
  assert (tmp_path / "runs/first_hf/model.safetensors").is_file()


# Commands that the next test leaves out, by what they need.
_LEFT_OUT = "|".join(
  [
    r"--weights=|preflight|from_big_vision",  # Downloads and extras.
    r"gs://|hf://|hf:|^push (?!.*--dry_run)",  # Accounts.
    r"^study |--config=study:steps=1000|runs/quickstart",  # Many minutes.
  ]
)


@pytest.mark.parametrize(
  ("page", "slow"),
  [
    pytest.param("README.md", r"|--evals=all", marks=pytest.mark.slow),
    pytest.param("README.md", "", marks=pytest.mark.long),
    pytest.param("docs/first_day.md", "", marks=pytest.mark.long),
  ],
)
def test_commands_of_a_page_run_as_printed(page, slow, model, tmp_path):
  doc_commands.write_photos(tmp_path)
  env = doc_commands.write_program(tmp_path / "bin")
  for words in doc_commands.read_commands(ROOT / page, tmp_path):
    if re.search(_LEFT_OUT + slow, " ".join(words)):
      continue
    words = [_MODELS.sub(str(model), word) for word in words]
    if words[0] == "train" and (slow or "continue_from" in " ".join(words)):
      words.append("--config.total_steps=4")
    done = subprocess.run(
      ["mtv-jax", *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}: {done.stderr[-4000:]}"
    if "--workdir=runs/a" in words:  # README compares it with another run.
      shutil.copytree(tmp_path / "runs/a", tmp_path / "runs/b")
