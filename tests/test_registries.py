"""What the package needs to know of a type is on its class."""

import dataclasses

import numpy as np
import tiny_mtv

from mtv_jax import objectives
from mtv_jax.config import data_arguments
from mtv_jax.config.options import get_annotations
from mtv_jax.data import ops
from mtv_jax.data import registry as sources
from mtv_jax.data.sources.base import Source
from mtv_jax.evals.core import base as evals
from mtv_jax.models import heads
from mtv_jax.models.heads.base import PredictionHead
from mtv_jax.objectives.base import Objective
from mtv_jax.studies import arms
from mtv_jax.train.optim.transforms import OPTIMIZERS, UpdateRule

PREDICTIONS = [
  (kind, name, head)
  for kind, cls in {**heads.HEADS, **heads.RELEASED}.items()
  for name, head in cls().predictions().items()
]


def test_objectives(repo_root):
  page = (repo_root / "docs" / "training.md").read_text(encoding="utf-8")
  for name, kind in objectives.REGISTRY.items():
    assert issubclass(kind, Objective) and dataclasses.is_dataclass(kind), name
    assert kind.group in ("", *arms.GROUPS), name
    head = getattr(kind, "head", None)
    head = type(head) if isinstance(head, PredictionHead) else None
    assert head is heads.HEADS.get(name), name
    assert f"`{name}" in page or f"objectives.{name}" in page, name
  assert heads.HEADS.keys() <= objectives.REGISTRY.keys()
  # The step over devices and parts is tested with every objective but one,
  # whose teacher is a folder.
  tested = {type(o) for o in tiny_mtv.everything().objectives.values()}
  (left_out,) = set(objectives.REGISTRY.values()) - tested
  assert left_out is objectives.REGISTRY["feature_distillation"]


def test_heads():
  names = [name for _, name, _ in PREDICTIONS]
  assert len(set(names)) == len(names)
  for kind, name, head in PREDICTIONS:
    assert heads.head_type(head) == kind, name
    assert not set(head.inputs) & {"images", "batch_size", "resize"}, name


def test_evaluations():
  given = {"text", *heads.HEADS} | {name for _, name, _ in PREDICTIONS}
  titles = []
  for name in evals.EVALUATORS:
    kind = evals.evaluator_class(name)
    assert issubclass(kind, evals.Evaluator), name
    assert evals.build_evaluator(name, {}).requires <= given, name
    assert kind.main is None or isinstance(kind.main, tuple), name
    titles += [kind.title] if kind.title else []
  assert len(set(titles)) == len(titles)


def test_sources(repo_root):
  page = (repo_root / "docs" / "data.md").read_text(encoding="utf-8")
  suffixes = {n: k.suffix for n, k in sources.SOURCES.items() if k.suffix}
  assert suffixes == sources.SHARD_SUFFIXES
  for name, kind in sources.SOURCES.items():
    assert issubclass(kind, Source) and get_annotations(kind), name
    assert f"| `{name}` |" in page, name


def test_optimizers(repo_root):
  page = (repo_root / "docs" / "training.md").read_text(encoding="utf-8")
  params = {"image": {"blocks": {"kernel": np.ones((2, 3, 3), np.float32)}}}
  for name, kind in OPTIMIZERS.items():
    assert issubclass(kind, UpdateRule) and f"`{name}`" in page, name
    tx = kind().scale({"image": 1})
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["image"]["blocks"]["kernel"].shape == (2, 3, 3), name
    assert isinstance(kind().describe(["image/blocks/kernel"]), str), name


def test_data_arguments():
  """Arguments of recipes are read without the classes they speak of."""
  labels, label_ops = data_arguments._LABELS, data_arguments._LABEL_OPS
  spec = tiny_mtv.everything()
  for name, op in label_ops.items():
    fields = spec.objectives[name].needs().fields
    assert {*fields} <= {*ops.OPS[op].batch_fields}, name
    assert labels[name] in ops.OPS[op].record_fields, name
  assert labels.keys() == label_ops.keys() <= objectives.REGISTRY.keys()
  evaluated = {*data_arguments._VAL}.union(*data_arguments._BENCHMARKS.values())
  for name in evaluated:
    requires = evals.build_evaluator(name, {}).requires
    needs = data_arguments._NEEDS.get(name)
    # Boxes of other encoders are embedded by crops.
    assert (needs in requires) == bool(requires) or name == "grounding", name
