"""README and docs/ speak of what there is: commands, options, files, links."""

import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
  *sorted((ROOT / "docs").glob("*.md")),
]
SOURCES = sorted(
  path
  for folder in ("mtv_jax", "configs", "tools")
  for path in (ROOT / folder).rglob("*.py")
)
# Anything that looks like `python tools/x.py ... --option`, a line or several.
_COMMAND = re.compile(r"python tools/(\w+)\.py((?:[^`\n]|\\\n)*)")
_OPTION = re.compile(r"--(\w[\w-]*)")
# Options of the training command that are not config keys.
_MAIN = re.compile(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"")


def written():
  for path in [*PAGES, *SOURCES]:
    yield path, path.read_text(encoding="utf-8")


def commands():
  found = {}
  for path, text in written():
    for tool, arguments in _COMMAND.findall(text):
      options = found.setdefault(tool, {})
      for option in _OPTION.findall(arguments):
        options.setdefault(option, path.relative_to(ROOT))
  return found


@pytest.mark.parametrize("tool", sorted(commands()))
def test_every_option_of_a_tool_exists(tool, capsys):
  path = ROOT / "tools" / f"{tool}.py"
  assert path.is_file(), f"no tools/{tool}.py"
  known = set(_OPTION.findall(path.read_text(encoding="utf-8")))
  # Options that are made in a loop show in the help of a command alone.
  main = runpy.run_path(str(path))["main"]
  for command in ([], ["boxes"], ["depth"], ["to_hf"], ["from_hf"]):
    with pytest.raises(SystemExit):
      main([*command, "--help"])
    known |= set(_OPTION.findall(capsys.readouterr().out))
  for option, where in commands()[tool].items():
    assert option in known, f"{where}: tools/{tool}.py has no --{option}"


def test_every_option_of_the_training_command_exists():
  text = (ROOT / "mtv_jax" / "main.py").read_text(encoding="utf-8")
  known = {*_MAIN.findall(text), "config"}
  assert len(known) > 4
  command = re.compile(r"python -m mtv_jax\.main((?:[^`\n]|\\\n)*)")
  seen = 0
  for path, page in written():
    for arguments in command.findall(page):
      for option in _OPTION.findall(arguments):
        assert option in known, f"{path.relative_to(ROOT)}: no --{option}"
        seen += 1
  assert seen > 8


def test_every_file_that_is_named_exists():
  named = re.compile(r"\b((?:configs|tools|docs|tests)/\w+\.(?:py|md))\b")
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


def test_python_in_the_pages_is_python():
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
      compile(block, page.name, "exec")
