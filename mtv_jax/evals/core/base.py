"""The contract of an evaluation, and the registry of them.

An evaluation is a frozen dataclass: its fields are its options, as a config or
a command line gives them, and `run(encoder)` returns figures together with
everything that they depend on. To add one, write its file and name it in
`EVALUATORS`. Where an encoder lacks what an evaluation needs (a text tower, a
head), or the data does (captions, depth), `prepare` or `run` raises
`NotApplicable`: among `all` evaluations it is then skipped with that reason,
and asked for by name it is an error like any other.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mtv_jax.config.schema import UNITS
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.utils.errors import ConfigError, InputError, did_you_mean

# Imported when asked for, so that one evaluation's needs burden no other. In
# the order of tables.
EVALUATORS = {
  "zero_shot": ("mtv_jax.evals.classification.zero_shot", "ZeroShot"),
  "retrieval": ("mtv_jax.evals.retrieval.retrieval", "Retrieval"),
  "knn": ("mtv_jax.evals.classification.knn", "KNN"),
  "few_shot": ("mtv_jax.evals.classification.few_shot", "FewShot"),
  "linear_probe": ("mtv_jax.evals.classification.linear_probe", "LinearProbe"),
  "logistic": ("mtv_jax.evals.classification.logistic", "Logistic"),
  "mae_probe": ("mtv_jax.evals.classification.mae_probe", "MaeProbe"),
  "segmentation": ("mtv_jax.evals.segmentation.segmentation", "Segmentation"),
  "zero_shot_segmentation": (
    "mtv_jax.evals.segmentation.zero_shot",
    "ZeroShotSegmentation",
  ),
  "depth_probe": ("mtv_jax.evals.depth.probe", "DepthProbe"),
  "relative_depth": ("mtv_jax.evals.depth.relative_depth", "RelativeDepth"),
  "geometric_correspondence": (
    "mtv_jax.evals.correspondence.geometric",
    "GeometricCorrespondence",
  ),
  "semantic_correspondence": (
    "mtv_jax.evals.correspondence.semantic",
    "SemanticCorrespondence",
  ),
  "grounding": ("mtv_jax.evals.grounding.grounding", "Grounding"),
  "patch_pca": ("mtv_jax.evals.segmentation.patch_pca", "PatchPca"),
}


class NotApplicable(InputError):
  """An encoder or a data set has not what the evaluation needs.

  The message is the reason, in a sentence that ends a table's row: what is
  lacking and where it would come from. A mistake (a missing file, a bad
  option) is not this but a ValueError or an OSError.
  """


@dataclasses.dataclass(frozen=True)
class Result:
  """Figures and how they were made.

  Attributes:
    metrics: fractions (0..1) by name, unless the name says another unit.
    protocol: everything the figures depend on, JSON-able: input size,
      preprocessing, weights, tie rule, data and its hash.
    chance: for some of the metrics, what a random encoder expects to get.
    units: of the metrics that are no fractions ("m", or "" for a plain
      number), which a table prints as they are rather than in percent.
    lower: names of the metrics of which less is better.
    pictures: uint8 `[H, W, 3]` sheets by name, for people to look at; no part
      of the JSON.
  """

  metrics: dict[str, float]
  protocol: dict[str, Any]
  chance: dict[str, float] = dataclasses.field(default_factory=dict)
  units: dict[str, str] = dataclasses.field(default_factory=dict)
  lower: tuple[str, ...] = ()
  pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def to_dict(self) -> dict[str, Any]:
    """For JSON."""
    fields = dataclasses.asdict(dataclasses.replace(self, pictures={}))
    del fields["pictures"]
    return {**fields, "lower": list(self.lower)}


class Evaluator:
  """Base of the evaluations; subclasses are frozen dataclasses."""

  def prepare(self) -> None:
    """Opens the data, so that a mistake shows before anything is computed.

    What is opened stays open: an evaluator may run many times.
    """

  def run(self, encoder: Encoder) -> Result:
    """Evaluates; the same call on every host of a pod."""
    raise NotImplementedError(f"{type(self).__name__} does not define run()")


def require_text(encoder: Encoder) -> None:
  """Refuses an encoder without a text tower, before anything is computed.

  Raises:
    NotApplicable: where it has none.
  """
  spec = getattr(encoder, "spec", None)
  if spec is not None and spec.text is None:
    raise NotApplicable(
      "this encoder has no text tower; a contrastive run, SigLIP or CLIP has"
    )


def preprocess_protocol(encoder: Encoder, **how: Any) -> dict[str, Any]:
  """A protocol's `preprocess` where the evaluation resizes and crops itself.

  Args:
    encoder: of whose preprocessing the mean and the std apply, and no more.
    how: what was done instead.
  """
  own = encoder.preprocess
  return {"mean": list(own.mean), "std": list(own.std), **how}


def evaluator_class(kind: str, *, where: str = "") -> type[Evaluator]:
  """The class of a type of evaluation.

  Args:
    kind: a name in `EVALUATORS`.
    where: what the error begins with.

  Raises:
    ConfigError: for a name that is none.
  """
  if kind not in EVALUATORS:
    raise ConfigError(
      f"{where}no evaluation of type {kind!r}. "
      f"{did_you_mean(str(kind), EVALUATORS)}"
    )
  module, attribute = EVALUATORS[kind]
  return getattr(importlib.import_module(module), attribute)


def default_options(kind: str) -> dict[str, Any]:
  """The options of a type of evaluation with their defaults."""
  fields = dataclasses.fields(evaluator_class(kind))
  return {
    f.name: f.default
    if f.default_factory is dataclasses.MISSING
    else f.default_factory()
    for f in fields
  }


def build_evaluator(
  name: str, config: Mapping[str, Any] | ConfigDict
) -> Evaluator:
  """The evaluator that an entry of `config.evals` describes.

  Args:
    name: the entry's name, and its type where `config` gives none.
    config: options of the evaluation. When to run it (`every_steps` and its
      like) is the trainer's business and ignored here.

  Raises:
    ConfigError: for an unknown type or option, or a bad value of one.
  """
  options = dict(config)
  kind = options.pop("type", name)
  cls = evaluator_class(kind, where=f"config.evals.{name}: ")
  when = [f"every_{unit}" for unit in UNITS]
  options = {k: _plain(v) for k, v in options.items() if k not in when}
  known = [field.name for field in dataclasses.fields(cls)]
  for option in options:
    if option not in known:
      raise ConfigError(
        f"config.evals.{name}: {kind} has no option {option!r}. "
        f"{did_you_mean(option, [*known, *when])}"
      )
  return cls(**options)


def _plain(value: Any) -> Any:
  """ConfigDicts as dictionaries and lists as tuples, so options are values."""
  if hasattr(value, "to_dict"):
    return value.to_dict()
  return tuple(value) if isinstance(value, list) else value
