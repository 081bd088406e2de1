"""Mutations of valid files and arguments, over everything a command reads.

Each is used, or ends in a named error; none reads or writes outside.
"""

import contextlib
import functools
import io
import json
import pathlib
import shutil
import tempfile

import numpy as np
import random_trees
import safetensors.numpy
import study_samples
from convert.test_torch_files import save_state
from family_specs import SPECS, TEXT_SPECS
from hostile import foreign_samples, mutations
from hostile.harness import Cases, run_all

import mtv_jax.cli.config
import mtv_jax.cli.report  # noqa: F401 (the time of imports is not a case's)
from mtv_jax.cli.main import run_command
from mtv_jax.cli.train import dry_run
from mtv_jax.config import overrides, recipes, sections
from mtv_jax.config.origin import Origin
from mtv_jax.convert import card, huggingface
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder import loading
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.train.config import resolve
from mtv_jax.utils.errors import InputError

ANY = "error skip used"
_KINDS = "run", "study", "open_clip", "timm", "torch"
# vit_pe_spatial_tiny_patch16_512, but smaller.
_TIMM = {
  **SPECS["perception_encoder"], "width": 48, "heads": 3, "mlp_dim": 96,
  "depth": 1, "patch_size": 16, "gelu": "exact", "norm_eps": 1e-5,
  "rope": dict(base=1e4, normalize="index", reference=32, offset=0.0),
}  # fmt: skip
SMALLEST = str(pathlib.Path(__file__).parents[1] / "configs/smallest.py")


@functools.cache
def _valid(kind: str) -> pathlib.Path:
  """A valid folder, written once by a process; don't change it."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="valid")) / kind
  if kind == "run":
    study_samples.write_run(folder)
    (folder / "command.txt").write_text("mtv-jax train")
    samples = {"images": [], "captions": ["a"]}
    (folder / "samples").mkdir()
    (folder / "samples/samples.json").write_text(json.dumps(samples))
    (folder / "run.json").write_text('{"sessions": []}')
  elif kind in ("open_clip", "timm", "torch"):
    fields = _TIMM if kind == "timm" else TEXT_SPECS["clip"]
    spec = ModelSpec.from_config({**fields, "image_size": 64})
    params = random_trees.random_params(spec)
    params["heads"] = {}
    if spec.text is not None:
      params["heads"]["contrastive"] = {"logit_scale": np.float32(2.0)}
    pixels = {"size": 64, "resize": "squash", "interpolation": "bicubic"}
    base = Origin(name="a", licence="mit", data=("b",))
    origin = Origin(training="lora", init=base, teachers={"c": base})
    model = ConvertedModel(spec, params, pixels, origin=origin)
    if kind == "open_clip":
      huggingface.write_open_clip(folder, model)
    else:
      huggingface.write(folder, model)
    if kind == "torch":
      weights = folder / "model.safetensors"
      save_state(folder / "a.pth", safetensors.numpy.load_file(weights))
      weights.unlink()
    if kind != "timm":
      (folder / "mtv_jax.json").unlink()
  else:
    arms = [("a", ("contrastive",), 0.0), ("b", ("contrastive", "dino"), 0.1)]
    study_samples.write_study(folder, "ladder", arms, seeds=2)
  return folder


def _copy(kind: str, folder: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(_valid(kind), folder / kind))


def _run(*args: str) -> str:
  """Runs a command; its message becomes a named error."""
  stream = io.StringIO()
  try:
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
      run_command(*args[:1], list(args[1:]))
  except SystemExit as error:
    if error.code not in (None, 0):
      text = error.code if isinstance(error.code, str) else stream.getvalue()
      raise InputError(text[-2000:]) from None
  return "used"


# --- Pages of runs and studies -----------------------------------------------

RUNS = Cases(__file__, "pages of runs", fast=30)
STUDIES = Cases(__file__, "pages of studies", fast=20)


def _report(kind, folder, mutate):
  path = _copy(kind, folder)
  mutate(path)
  _run("report", str(path), f"--output={folder / 'page'}")
  _check_inside(folder)


def _check_inside(folder):
  written = {path.name for path in folder.iterdir()}
  assert len(written) < 3 and written - {"page"} <= {*_KINDS}, written


def _read_last(kind, file):
  text = (_valid(kind) / file).read_text()
  return json.loads(text.splitlines()[-1])


def _add_json(cases, kind, file, count, lines=False):
  named = mutations.json_mutations(
    file, _read_last(kind, file), count, lines=lines
  )
  cases.add_table(functools.partial(_report, kind), named, expects=ANY)


for file, count in {
  "config.json": 40,
  "evals/zero_shot_400.json": 40,
  "samples/samples.json": 10,
  "run.json": 10,
}.items():
  _add_json(RUNS, "run", file, count)
_add_json(RUNS, "run", "metrics.jsonl", 40, lines=True)
_add_json(RUNS, "run", "interference.jsonl", 40, lines=True)
RUNS.add_table(
  functools.partial(_report, "run"),
  {
    **mutations.file_mutations("command.txt"),
    **mutations.file_mutations("evals/depth_probe_400/examples.png"),
  },
  expects=ANY,
)
_add_json(STUDIES, "study", "study.json", 80)
_add_json(STUDIES, "study", "runs/a-s0/evals/zero_shot_400.json", 20)

# --- Folders of other libraries ----------------------------------------------

FOLDERS = Cases(__file__, "open_clip and timm", fast=20)
FAMILIES = Cases(__file__, "families of transformers", fast=20)
ORIGINS = Cases(__file__, "origins", fast=4)


def _load(kind, folder, mutate):
  path = _copy(kind, folder)
  mutate(path)
  loading.load(path)
  _check_inside(folder)


for kind, file, fields in (
  ("open_clip", "open_clip_config.json", {}),
  ("timm", "config.json", {}),
  ("timm", "config.json", {"model_type": "timm_wrapper"}),
  ("timm", "mtv_jax.json", {}),
):
  value = json.loads((_valid(kind) / file).read_text())
  named = mutations.json_mutations(file, value | fields, 120)
  options = dict(expects=ANY, prefix=f"{kind} {' '.join(fields.values())}")
  FOLDERS.add_table(functools.partial(_load, kind), named, **options)

for family, config in foreign_samples.CONFIGS.items():
  _read = foreign_samples.read_edited(family, lambda path, mutate: mutate(path))
  for file, value, count in (
    ("config.json", config, 60),
    ("preprocessor_config.json", foreign_samples.PROCESSOR, 10),
  ):
    named = mutations.json_mutations(file, value, count)
    FAMILIES.add_table(_read, named, expects=ANY, prefix=f"{family} ")

_PTH = mutations.file_mutations("a.pth") | {
  f"a.pth, byte {i}": mutations.flip_byte("a.pth", i) for i in range(100)
}
FOLDERS.add_table(functools.partial(_load, "torch"), _PTH, expects=ANY)

_LABELS = Origin(name="a", revision="b", licence="mit")
_ORIGIN = sections.to_dict(
  Origin(training="full", init=_LABELS, labels={"depth": _LABELS}, data=("b",))
)


def _read_origin(folder, mutate):
  foreign_samples.write(folder, "origin.json", {"origin": _ORIGIN})
  mutate(folder)
  return card.describe_base(loading.read_origin(folder))


ORIGINS.add_table(
  _read_origin,
  mutations.json_mutations("origin.json", {"origin": _ORIGIN}, 100),
  expects=ANY,
)


def _push(folder, mutate):
  path = _copy("timm", folder)
  mutate(path)
  options = "--license=mit", "--data=x", "--base_model=lab/a", "--dry_run"
  _run("push", str(path), "lab/new", *options)
  _check_inside(folder)


_INFO = json.loads((_valid("timm") / "mtv_jax.json").read_text())
ORIGINS.add_table(
  _push,
  mutations.json_mutations("mtv_jax.json", _INFO, 120),
  expects=ANY,
  prefix="push: ",
)

# --- Overrides and recipes ---------------------------------------------------

OVERRIDES = Cases(__file__, "overrides", fast=40)
RECIPES = Cases(__file__, "recipes", fast=8)


def _override(folder, assignments):
  config = overrides.override(recipes.read_config(SMALLEST), assignments)
  dry_run(config, folder / "run")


def _overrides(count):
  rng = mutations.draw("overrides")
  # With the keys that the file leaves out.
  config = resolve(recipes.read_config(SMALLEST)).to_dict()
  config["data"]["train"][0]["weight"] = 1.0
  config["evals"]["retrieval"]["bound"] = {"metric": "x", "drop": 0.1}
  paths = [*mutations.json_paths(config)]
  named = {}
  while len(named) < count:
    parts = [*rng.choice(paths)]
    if rng.random() < 0.2:
      parts[rng.randrange(len(parts))] = rng.choice(
        ["__class__", "__dict__", "keys", "lock", "x", 99, "a b", ""]
      )
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts)
    value = rng.choice([*mutations.VALUES, "9" * 400, "-" * 5000, "[" * 3000])
    text = value if isinstance(value, str) else repr(value)
    named[f"{key[1:]}={ascii(text)[:24]}"] = [f"{key[1:]}={text}"]
  return named


OVERRIDES.add_table(_override, _overrides(1500), expects=ANY)


def _read_recipe(folder, content):
  path = folder / "recipe.py"
  path.write_bytes(content)
  _run("config", f"{path}")


_VALID = pathlib.Path(SMALLEST).read_bytes()
_RECIPES = {
  "binary": bytes(range(256)),
  "empty": b"",
  "JSON": b'{"seed": 1}',
  "an int": b"def get_config(arg=None): return 3",
  "None": b"def get_config(arg=None): pass",
  "a class": b"class get_config: pass",
  "an exception": b"def get_config(arg=None): raise OSError('x')",
  "an exit": b"def get_config(arg=None): raise SystemExit(3)",
  "recursion": b"def get_config(arg=None): return get_config(arg)",
  "no argument": b"def get_config(): return 3",
  "a syntax error": b"def get_config(:",
  "an import": b"import no_such_module",
  "a division": b"1 / 0",
} | {
  name: change(_VALID)
  for name, change in (mutations.BROKEN_BYTES | mutations.DAMAGED_BYTES).items()
}
RECIPES.add_table(_read_recipe, _RECIPES, expects=ANY)

test_mutations = run_all(
  RUNS, STUDIES, FOLDERS, FAMILIES, ORIGINS, OVERRIDES, RECIPES
)
