"""Commands of README and docs, and small data to run them.

Bash reads a page's shell blocks as they are printed, with variables, functions
and loops; an external command is not run, its words are recorded.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
from xla_options import xla_flags

from mtv_jax.convert import native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.models import two_tower

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"```(bash|text)\n(.*?)```", re.DOTALL)
# Bash calls the handler for each name that PATH lacks, in a subshell. `cd` to
# folders of other machines, and paths of programs, would end a block.
_PRELUDE = r"""
PATH=/none
command_not_found_handle() {
  { printf '%s\x1f' "$@"; printf '\x1e'; } >> "$RECORD"
}
cd() { :; }
source() { :; }
exec() { "$@"; }
cat() { while IFS= read -r; do printf '%s\n' "$REPLY"; done; }
"""
_ENVIRONMENT = dict(USER="user", SLURM_ARRAY_TASK_ID="1")
_ENVIRONMENT |= dict(SLURM_ARRAY_TASK_COUNT="2")
_PROGRAM = re.compile(r"(?<![\w/])[$~][\w/]*/bin/")


def read_commands(
  page: pathlib.Path, folder: pathlib.Path
) -> list[tuple[str, ...]]:
  """Names and arguments of a page's `mtv-jax` commands, in order.

  `folder` gets the files that the blocks write. Of sessions in text, the lines
  after `$ ` are commands.
  """
  blocks = []
  for kind, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
    if kind == "text":
      found = re.findall(r"^\$ ((?:.*\\\n)*.*)", text, re.MULTILINE)
      text = "\n".join(found)
    blocks.append(text)
  return list(_expand("\n".join(blocks), folder))


def _expand(script, folder):
  record = folder / "record"
  record.write_bytes(b"")
  source = f"{_PRELUDE}\n{_PROGRAM.sub('', script)}\nwait\n"
  done = subprocess.run(
    ["bash"], input=source, text=True, cwd=folder, capture_output=True,
    env={**_ENVIRONMENT, "RECORD": str(record), "HOME": str(folder)},
    check=False,
  )  # fmt: skip
  assert not done.stderr, f"{script}: {done.stderr}"
  for line in record.read_text(encoding="utf-8").split("\x1e")[:-1]:
    words = tuple(line.split("\x1f")[:-1])
    for i, word in enumerate(words):
      if word == "mtv-jax":  # Twice for supervise and its command.
        yield words[i + 1 :]
      elif words[i : i + 3] == ("python", "-m", "mtv_jax.main"):
        yield "train", *words[i + 3 :]
      elif re.search(r"(mtv-jax|mtv_jax\.main) -?", word):
        # A command for another machine.
        yield from _expand(word.removeprefix("--command="), folder)


def write_model(folder: pathlib.Path) -> pathlib.Path:
  """A small two-tower model with random weights, in place of a released one."""
  tower = dict(width=32, depth=1, heads=2, mlp_dim=64)
  text = dict(length=16, vocab_size=258, **tower)
  spec = two_tower.ModelSpec.from_config(
    dict(image_size=16, patch_size=8, **tower, text=text)
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
    two_tower.abstract_params(spec),
  )
  head = dict(logit_scale=np.float32(1), logit_bias=np.float32(0))
  params = {**params, "heads": {"contrastive": head}}
  tokenizer = TokenizerFiles(None, "lower")
  model = ConvertedModel(spec, params, {"size": 16}, tokenizer)
  return pathlib.Path(native.write(folder, model))


def write_photos(folder: pathlib.Path) -> None:
  """Photos with captions, boxes and depth, as docs/first_day.md names them."""
  images, annotations, names = [], [], []
  (folder / "depths").mkdir(parents=True)
  for name, first, count in (("photos", 0, 96), ("photos_val", 1000, 32)):
    (folder / name).mkdir()
    scenes = SceneSource(64, length=count, first=first, difficulty="easy")
    for i in range(count):
      scene, stem, key = scenes[i], f"{first + i:04}", first + i
      Image.fromarray(scene["image"]).save(folder / name / f"{stem}.jpg")
      text = folder / name / f"{stem}.txt"
      text.write_text(scene["captions"][0], encoding="utf-8")
      metres = 1000 / np.maximum(scene["depth"], 0.02)  # Millimetres.
      depth = Image.fromarray(metres.astype(np.uint16))
      depth.save(folder / "depths" / f"{stem}.png")
      images.append(dict(id=key, file_name=f"{stem}.jpg", width=64, height=64))
      for phrase, (y0, x0, y1, x1) in zip(
        scene["phrases"], 64 * scene["boxes"].astype(float), strict=True
      ):
        names += [] if phrase in names else [phrase]
        box = dict(bbox=[x0, y0, x1 - x0, y1 - y0], image_id=key, iscrowd=0)
        box |= dict(category_id=names.index(phrase), id=len(annotations))
        annotations.append(box)
  categories = [dict(id=i, name=name) for i, name in enumerate(names)]
  content = dict(images=images, annotations=annotations, categories=categories)
  text = json.dumps(content)
  (folder / "instances.json").write_text(text, encoding="utf-8")


def write_program(folder: pathlib.Path) -> dict[str, str]:
  """Puts `mtv-jax` and `python` of this environment on the PATH."""
  folder.mkdir()
  code = "from mtv_jax.cli.main import main; import sys; sys.exit(main())"
  for name, words in (("mtv-jax", f"-c '{code}'"), ("python", "")):
    file = folder / name
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
    file.chmod(0o755)
  path = os.pathsep.join([str(folder), os.environ["PATH"]])
  python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  env = {**os.environ, "PATH": path, "PYTHONPATH": python_path}
  return env | {"XLA_FLAGS": xla_flags(devices=1)}


def read_notebook(path: pathlib.Path) -> str:
  """A notebook as a program: `!` lines run a shell, `%` lines are left out."""
  source = [
    "import subprocess, sys, types",
    "sys.modules['IPython'] = types.ModuleType('IPython')",
    "sys.modules['IPython.display'] = types.SimpleNamespace(HTML=print)",
  ]
  for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
    assert not cell.get("outputs"), "the notebook is stored without outputs"
    if cell["cell_type"] == "code":
      text = re.sub(r"(?m)^%.*", "", "".join(cell["source"]))
      source.append(re.sub(r"(?m)^!((?:.*\\\n)*.*)", _run_shell, text))
  return "\n\n".join(source)


def _run_shell(match):
  names = re.sub(r"{(\w+)}", r"' + str(\1) + '", repr(match[1]))
  return f"subprocess.run({names}, shell=True, check=True)"
