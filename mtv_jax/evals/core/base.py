"""Evaluator base class and registry.

An evaluator is a frozen dataclass: its fields are the options of a config or a
command line, and `run(encoder)` returns metrics with the protocol that they
depend on. To add one, write its file and a line in `EVALUATORS`; a config or a
command line may also name a user's class, `MODULE:NAME`. A trained head's
predictions come from `encoder.predict`. If, say, the encoder lacks a text tower
or the data lack captions, `prepare` or `run` raises `NotApplicable`: then `all`
skips the evaluation with that reason; if requested by name, it fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from mtv_jax.config import options as options_lib
from mtv_jax.config.durations import UNITS
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import ImageSet
from mtv_jax.utils.errors import InputError

# Class by type, in table order; imported on lookup.
EVALUATORS = {
  name: f"mtv_jax.evals.{path}"
  for name, path in {
    "zero_shot": "classification.zero_shot:ZeroShot",
    "retrieval": "retrieval:Retrieval",
    "compositionality": "retrieval:Compositionality",
    "knn": "classification.knn:KNN",
    "few_shot": "classification.few_shot:FewShot",
    "linear_probe": "classification.linear_probe:LinearProbe",
    "logistic": "classification.logistic:Logistic",
    "mae_probe": "classification.mae_probe:MaeProbe",
    "finetune": "classification.finetune:Finetune",
    "vtab": "classification.vtab:Vtab",
    "segmentation": "segmentation.segmentation_probe:Segmentation",
    "zero_shot_segmentation": "segmentation.zero_shot:ZeroShotSegmentation",
    "depth_probe": "depth.depth_probe:DepthProbe",
    "surface_normals": "depth.depth_probe:NormalsProbe",
    "relative_depth": "depth.relative_depth:RelativeDepth",
    "geometric_correspondence": (
      "correspondence.geometric:GeometricCorrespondence"
    ),
    "semantic_correspondence": "correspondence.semantic:SemanticCorrespondence",
    "video_segmentation": "video:VideoSegmentation",
    "grounding": "grounding:GroundingEvaluator",
    "captioning": "captioning:CaptioningEvaluator",
    "vqa": "visual_questions:VisualQuestions",
    "drift": "drift:Drift",
    "feature_rank": "feature_rank:FeatureRank",
  }.items()
}


class NotApplicable(InputError):
  """Raised when an encoder or a data set lacks what an evaluation needs.

  The message says what is missing and how to get it; reports show it in the
  last column. User mistakes (a missing file, a bad option) raise other errors.
  """


@dataclasses.dataclass(frozen=True)
class Result:
  """Metrics and their protocol."""

  metrics: dict[str, float]  # fractions (0..1), except metrics in `units`
  # Everything the metrics depend on, JSON-serializable: input size,
  # preprocessing, weights, tie rule, data and its hash.
  protocol: dict[str, Any]
  # Chance level of some metrics.
  chance: dict[str, float] = dataclasses.field(default_factory=dict)
  # Units of metrics that aren't fractions: "m", or "" for plain numbers.
  units: dict[str, str] = dataclasses.field(default_factory=dict)
  lower: tuple[str, ...] = ()  # metrics where lower is better
  # Standard errors of metrics over the items of the set, see `bootstrap.py`.
  errors: dict[str, float] = dataclasses.field(default_factory=dict)
  # Metrics per bootstrap resample, see `bootstrap.py`; not in the JSON.
  resamples: dict[str, np.ndarray] = dataclasses.field(
    default_factory=dict, compare=False
  )
  type: str = ""  # see `evaluator_type`; empty in results of older versions
  # uint8 `[H, W, 3]` image grids of examples by name; not in the JSON.
  sheets: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  # The evaluator's main metrics, set by `evals.run`; not in the JSON if None.
  main: tuple[str, ...] | None = None

  @classmethod
  def from_estimate(
    cls,
    estimate: Estimate,
    protocol: dict[str, Any],
    chance: Mapping[str, float],
    **fields: Any,
  ) -> Result:
    """Builds a result from an estimate; `fields` are its further fields."""
    return cls(
      estimate.metrics,
      protocol,
      dict(chance),
      errors=estimate.errors,
      resamples=estimate.resamples,
      **fields,
    )

  def to_dict(self) -> dict[str, Any]:
    """Converts to a JSON-serializable dict."""
    without_arrays = dataclasses.replace(self, sheets={}, resamples={})
    fields = dataclasses.asdict(without_arrays)
    del fields["sheets"], fields["resamples"]
    if self.main is None:
      del fields["main"]
    return {**fields, "lower": list(self.lower)}


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Base class of the evaluators; subclasses are frozen dataclasses.

  Common options: `data` (see `datasets/registry.py`), `count` (number of items,
  evenly spaced; all by default), `images` (image folder, if not beside the
  JSON), `batch_size` (images per encoder batch), `pictures` (items per sheet).
  """

  # What the encoder needs: "text", a name for `Encoder.predict`, or the type of
  # a head (`heads.HEADS`).
  requires = frozenset()
  # Whether it reads the encoder's folder, which a run's live encoder lacks.
  reads_folder = False
  title = ""  # In reports, of built-in types; "" takes the words of the name.
  # Metrics that reports chart; empty if neither direction is better; None for
  # the first metric.
  main: ClassVar[tuple[str, ...] | None] = None
  # Pattern of the names of all metrics, so that a misspelt one is known before
  # an evaluation; None if unknown.
  metric_pattern: ClassVar[str | None] = None
  # The opened data; most subclasses define it as a `cached_property`.
  _set = None
  # Options that don't change metrics, or are covered by the data's hash.
  _neutral = frozenset(
    {"data", "train", "images", "count", "train_count", "pictures"}
    | {"batch_size", "encode_batch"}
  )

  def __post_init__(self):
    options_lib.check_fields(self)

  def prepare(self) -> None:
    """Opens the data, so that mistakes fail before anything is computed.

    The data stay open between runs.
    """
    _ = self._set

  def count_images(self) -> int | None:
    """Number of test images, after `prepare`; None if unknown."""
    data = getattr(self._set, "test", self._set)
    parts = data if isinstance(data, tuple) else (data,)
    counts = [len(part.images) for part in parts if hasattr(part, "images")]
    return counts[-1] if counts else None

  def data_digest(self) -> str:
    """Hash of the opened data's names, sizes, labels and some pixels."""
    digests = []
    for part in self._opened():
      part = getattr(part, "content", None) or getattr(part, "digest", None)
      digests += [part] if isinstance(part, str) else []
    return "-".join(dict.fromkeys(digests))

  def _opened(self) -> Iterable[Any]:
    """The data sets that `prepare` opened."""
    data = self._set
    parts = [data, *(data if isinstance(data, tuple) else ())]
    parts += data.values() if isinstance(data, Mapping) else ()
    return [getattr(p, name, p) for p in parts for name in ("train", "test")]

  def needed_features(
    self, encoder: Encoder
  ) -> Iterable[tuple[Encoder, ImageSet, Sequence[str]]]:
    """Lists cached features that `run` may request, see `share_features`.

    Each item has an encoder with its preprocessing, images and feature names.
    """
    del encoder
    return ()

  def changed_options(self) -> dict[str, Any]:
    """Non-default options that metrics depend on."""
    return {
      name: value
      for name, default in _field_defaults(type(self)).items()
      if name not in self._neutral and (value := getattr(self, name)) != default
    }

  def run(self, encoder: Encoder) -> Result:
    """Evaluates an encoder; on a pod, call it on every host."""
    raise NotImplementedError(f"{type(self).__name__} does not define run()")


def require_text(encoder: Encoder) -> None:
  """Raises NotApplicable for an encoder without a text tower."""
  spec = getattr(encoder, "spec", None)
  if spec is not None and spec.text is None:
    raise NotApplicable(
      "this encoder has no text tower; use a contrastive run, SigLIP or CLIP"
    )


def preprocess_protocol(encoder: Encoder, **steps: Any) -> dict[str, Any]:
  """A protocol's `preprocess`: the encoder's mean and standard deviation.

  `steps` are the evaluation's resizing and cropping.
  """
  preprocess = encoder.preprocess
  return {"mean": [*preprocess.mean], "std": [*preprocess.std], **steps}


def evaluator_class(kind: str, *, where: str = "--evals") -> type[Evaluator]:
  """Looks up a name in `EVALUATORS`, or imports a user's `MODULE:NAME`."""
  return options_lib.look_up(EVALUATORS, kind, where=where, base=Evaluator)


def evaluation_type(name: str, recorded: str = "") -> str:
  """The recorded type, else the one in the name: `knn` for `val_knn`."""
  if recorded or options_lib.is_plugin(name):
    return recorded or name
  return max((t for t in EVALUATORS if t in name), key=len, default=name)


def registered_class(name: str, recorded: str = "") -> type[Evaluator]:
  """Looks up the class of an evaluation by name, for reports.

  Returns the base class for plug-ins, which reports don't import.
  """
  kind = evaluation_type(name, recorded)
  return evaluator_class(kind) if kind in EVALUATORS else Evaluator


def evaluator_type(evaluator: Evaluator) -> str:
  """An evaluator's key in `EVALUATORS`, or `MODULE:NAME` of a user's class."""
  cls = type(evaluator)
  path = f"{cls.__module__}:{cls.__name__}"
  return next((kind for kind, p in EVALUATORS.items() if p == path), path)


def default_options(kind: str) -> dict[str, Any]:
  """An evaluation type's options, with their defaults."""
  return _field_defaults(evaluator_class(kind))


def _field_defaults(cls: type[Evaluator]) -> dict[str, Any]:
  return {
    f.name: f.default
    if f.default_factory is dataclasses.MISSING
    else f.default_factory()
    for f in dataclasses.fields(cls)
  }


def build_evaluator(
  name: str, config: Mapping[str, Any] | ConfigDict
) -> Evaluator:
  """Builds an evaluator from an entry of `config.evals`.

  Args:
    name: the entry's name, and its type if `config` lacks one.
    config: options of the evaluation; the trainer's schedule (`every_steps`,
      ...) is ignored.

  Raises:
    ConfigError: unknown type or option, or bad value.
  """
  where = f"config.evals.{name}"
  schedule = [f"every_{unit}" for unit in UNITS]
  options = {k: v for k, v in dict(config).items() if k not in schedule}
  cls = evaluator_class(options.pop("type", name), where=where)
  return options_lib.build(cls, options, where=where, reserved=schedule)
