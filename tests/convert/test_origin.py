"""Origins of runs and exports, and the model cards that tell them."""

import dataclasses
import inspect
import shutil

import huggingface_hub
import pytest
import trainings
from hostile import foreign_samples as samples

from mtv_jax.cli import main
from mtv_jax.config import origin, recipes
from mtv_jax.config.origin import Origin
from mtv_jax.convert import card, huggingface, native
from mtv_jax.encoder import loading
from mtv_jax.train import describe
from mtv_jax.train.config import resolve
from mtv_jax.utils.errors import InputError

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  """A model of the hub's cache, whose licence is not permissive."""
  cache = tmp_path_factory.mktemp("hub")
  folder = cache / "models--lab--siglip" / "snapshots" / COMMIT
  shutil.copytree(samples.base("siglip"), folder)
  card = "---\ntags:\n- x\nlicense:\n- cc-by-nc-4.0\n---\n# A model\n"
  (folder / "README.md").write_text(card)
  return folder


@pytest.fixture(scope="module")
def write(released, tmp_path_factory):
  """Writes an export of one of five kinds; training itself is left out."""
  labels = tmp_path_factory.mktemp("labels")
  expert = Origin(name="lab/expert", revision="1", licence="cc-by-nc-4.0")
  (labels / origin.FILE).write_text(origin.to_json(expert))

  def write(kind):
    model = huggingface.read(released)
    arg = {
      "continued": f"continue_from:path={released},data=scenes",
      "lora": f"continue_from:path={released},data=scenes,lora=2",
      "distilled": f"distill:teacher={released},data=scenes,student=mu/8",
    }.get(kind)
    if kind != "converted":
      config = recipes.read_config(arg) if arg else trainings.smallest()
      run, sources = resolve(config), [{"name": "scenes"}]
      if kind == "scratch":
        entry = dict(path="/a/b/coco", labels={"depth": str(labels)})
        data = dataclasses.replace(run.data, train=(entry,))
        run = dataclasses.replace(run, data=data)
        sources = [{"name": "/a/coco", "labels": {"depth": "digest"}}]
      described = describe.describe_origin(run, sources)
      model = dataclasses.replace(model, origin=described)
    return huggingface.write(tmp_path_factory.mktemp("out") / kind, model)

  return write


def push(folder, *options):
  command = ["push", str(folder), "lab/new", "--dry_run", *options]
  main.main(command)
  card = huggingface_hub.ModelCard.load(folder / "README.md")
  # The hub ignores other fields; its own validator needs a network.
  fields = inspect.signature(huggingface_hub.ModelCardData).parameters
  assert card.data.to_dict().keys() <= {*fields, "base_model_relation"}
  return card


@pytest.mark.parametrize(
  ("kind", "licence", "base", "text"),
  [
    ("scratch", "mit", None, "None: trained from random weights."),
    ("distilled", "mit", None, "None: trained from random weights."),
    ("continued", "cc-by-nc-4.0", "lab/siglip", ", continued."),
    ("lora", "cc-by-nc-4.0", "lab/siglip", ", continued with LoRA."),
    ("converted", "cc-by-nc-4.0", "lab/siglip", ", converted without"),
  ],
)
def test_cards_tell_where_weights_come_from(
  write, kind, licence, base, text, caplog
):
  folder = write(kind)
  options = ["--data=x"] if kind == "converted" else []
  card = push(folder, f"--license={licence}", *options)
  assert (card.data.license, card.data.base_model) == (licence, base)
  assert card.data.library_name == "transformers"
  section = card.text.partition("## Base model\n\n")[2].partition("\n## ")[0]
  named = f"lab/siglip, revision {COMMIT} (licence: cc-by-nc-4.0)"
  assert section.startswith(text if base is None else f"{named}{text}")
  data = card.text.partition("## Training data\n\n")[2].partition("\n\n")[0]
  names = {"scratch": "coco", "converted": None}.get(kind, "scenes")
  assert data == (f"Recorded names: {names}." if names else "x")
  learnt = {
    "scratch": "- expert for depth: lab/expert, revision 1",
    "distilled": f"- teacher: {named}",
  }
  if kind in learnt:
    assert learnt[kind] in section
    assert "is not for commercial use" in caplog.text
  if kind in ("continued", "lora"):  # The anchors' teacher is the base.
    assert "teacher" not in section
  # The record survives reading and writing.
  again = native.write(folder.with_name("again"), loading.read_model(folder))
  assert native.read_info(again).origin == native.read_info(folder).origin
  if base is None:
    with pytest.raises(SystemExit, match="comes from random weights: leave"):
      push(folder, "--license=mit", "--base_model=lab/siglip")
    return
  for wrong, message in (
    ("--license=mit", "lab/siglip, which.*has the licence cc-by-nc-4.0"),
    ("--base_model=lab/b", "comes from lab/siglip: leave it"),
  ):
    with pytest.raises(SystemExit, match=message):
      push(folder, f"--license={licence}", *options, wrong)


def test_a_local_base_must_be_named(tmp_path):
  model = huggingface.read(samples.base("siglip"))
  folder = huggingface.write(tmp_path / "out", model)
  with pytest.raises(SystemExit, match="from the folder siglip: name that"):
    push(folder, "--license=mit", "--data=x")
  card = push(folder, "--license=mit", "--data=x", "--base_model=lab/b")
  assert card.data.base_model == "lab/b"
  assert "lab/b (licence: not recorded), converted without" in card.text


def test_exports_without_a_record(tmp_path):
  """Earlier versions wrote none: the card does not claim random weights."""
  model = dataclasses.replace(
    huggingface.read(samples.base("siglip")), origin=None
  )
  folder = huggingface.write(tmp_path / "out", model)
  with pytest.raises(SystemExit, match="no record of its data: pass --data"):
    push(folder, "--license=mit")
  card = push(folder, "--license=mit", "--data=x")
  assert "## Base model\n\nNot recorded." in card.text


def test_the_nearest_published_model_is_the_base():
  released = Origin(name="lab/a", revision="1", licence="mit")
  run = Origin(name="run", training="full", init=released)
  assert Origin(training="lora", init=run).base == released
  own = dataclasses.replace(run, name="lab/mine", revision="2")
  assert Origin(training="full", init=own).base == own
  scratch = Origin(name="run", training="full")
  assert Origin(training="full", init=scratch).base is None
  with pytest.raises(InputError, match="nested too deeply"):
    deep = {}
    for _ in range(5000):
      deep = {"init": deep}
    origin.read(deep)


def test_licences_are_of_the_hub():
  with pytest.raises(InputError, match="'apache-2' is not.*apache-2.0"):
    card.check_licence("apache-2")
  card.check_licence("mit", Origin(licence="bsd-3-clause"))
