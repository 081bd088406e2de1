"""Results of evaluations and their JSON files.

One encoder's file is `{encoder, weights, mtv_jax, evals}`, as training writes
it, and `{name, skipped, failed}` for several requested evaluations; several
encoders' is `{mtv_jax, encoders: [...]}`, one such entry each.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

import mtv_jax
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core.base import Result
from mtv_jax.utils import atomic, plots
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Results, or reasons and errors, of one encoder by evaluation."""

  name: str  # in tables
  encoder: str  # the path it was loaded from
  weights: str  # `student`, `teacher` or `ema`
  results: dict[str, Result] = dataclasses.field(default_factory=dict)
  skipped: dict[str, str] = dataclasses.field(default_factory=dict)
  failed: dict[str, str] = dataclasses.field(default_factory=dict)
  # The encoder's own protocol; its results' protocols begin with it.
  protocol: dict[str, Any] = dataclasses.field(default_factory=dict)
  version: str = mtv_jax.__version__
  # The released checkpoint that it is said to be; see `evals/published.py`.
  checkpoint: str = ""


def write_json(
  path: str | os.PathLike, encoder: Encoder, results: Mapping[str, Result]
) -> None:
  """Writes metrics, chance and protocols of one encoder."""
  _write(
    path,
    {
      "encoder": encoder.source,
      "weights": encoder.weights,
      "mtv_jax": mtv_jax.__version__,
      "evals": {name: result.to_dict() for name, result in results.items()},
    },
  )


def write_arrays(
  stem: pathlib.Path, result: Result, *, sheets: bool = True
) -> None:
  """Writes what the JSON lacks: `STEM/SHEET.png` if `sheets`, and `STEM.npz`.

  The latter has the metrics of resamples of the items, by name; nothing is
  written for a result without any.
  """
  for name, file in _sheet_files(stem, result.sheets if sheets else ()).items():
    stem.mkdir(parents=True, exist_ok=True)
    plots.save_image(result.sheets[name], file)
  if result.resamples:
    stem.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # NumPy would add a suffix to a path.
    np.savez_compressed(buffer, **result.resamples)
    atomic.write(stem.with_name(f"{stem.name}.npz"), buffer.getvalue())


def read_resamples(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Metrics of resamples, from the .npz beside an evaluation's JSON, if any."""
  file = path.with_suffix(".npz")
  if not file.exists():
    return {}
  try:
    # Given a path, NumPy leaves a damaged file open.
    with np.load(io.BytesIO(file.read_bytes())) as arrays:
      return dict(arrays)
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise InputError(
      f"{file} can't be read ({error}). Remove it; then intervals are of the "
      "standard errors."
    ) from None


def read_sheets(
  stem: pathlib.Path, names: Sequence[str]
) -> dict[str, np.ndarray]:
  """The sheets that `write_arrays` wrote, by their names, in that order."""
  sheets = {}
  for name, file in _sheet_files(stem, names).items():
    with Image.open(file) as image:
      sheets[name] = np.asarray(image.convert("RGB"))
  return sheets


def _sheet_files(
  stem: pathlib.Path, names: Iterable[str]
) -> dict[str, pathlib.Path]:
  """A file for each sheet, as `STEM/a-b.png` of the names "a b" and "a/b"."""
  files = {}
  for name in names:
    file = re.sub(r"[^\w.-]+", "-", name)
    while stem / f"{file}.png" in files.values():
      file += "-"
    files[name] = stem / f"{file}.png"
  return files


def write(
  path: str | os.PathLike, outcomes: Sequence[Outcome], **more: Any
) -> None:
  """Writes the results of any number of encoders, with skips and failures.

  `more` are further entries of a file of one encoder.
  """
  encoders = []
  for outcome in outcomes:
    fields = dict(vars(outcome))
    fields["mtv_jax"] = fields.pop("version")
    results = fields.pop("results").items()
    fields["evals"] = {name: result.to_dict() for name, result in results}
    encoders.append(fields)
  content = {"mtv_jax": mtv_jax.__version__, "encoders": encoders}
  _write(path, {**encoders[0], **more} if len(encoders) == 1 else content)


def read(path: str | os.PathLike) -> list[Outcome]:
  """The outcomes in a file of `write` or `write_json`, without sheets."""
  path = pathlib.Path(path)
  try:
    content = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise InputError(
      f"{path} is not JSON ({error}). Evaluate again, or remove it."
    ) from None
  keys = sorted(content) if isinstance(content, dict) else type(content)
  if not isinstance(content, dict) or not {"encoders", "evals"} & {*content}:
    raise InputError(
      f"{path} has {keys}; expected the results of `evaluate` or of a run"
    )
  entries = content.get("encoders", [content])
  if not isinstance(entries, list):
    raise InputError(f'{path}: "encoders" is {entries!r:.60}, expected a list')
  return [_outcome(path, entry, content) for entry in entries]


def _outcome(
  path: pathlib.Path, entry: Mapping[str, Any], content: Mapping[str, Any]
) -> Outcome:
  try:
    return Outcome(
      name=entry.get("name") or entry["encoder"] or path.stem,
      encoder=entry["encoder"],
      weights=entry["weights"],
      results={name: _result(r) for name, r in entry["evals"].items()},
      skipped=dict(entry.get("skipped", {})),
      failed=dict(entry.get("failed", {})),
      protocol=dict(entry.get("protocol", {})),
      version=entry.get("mtv_jax", content.get("mtv_jax", "")),
      checkpoint=entry.get("checkpoint", ""),
    )
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise InputError(
      f"{path}: an entry of these results can't be read ({error!r})"
    ) from None


def _result(fields: Mapping[str, Any]) -> Result:
  def read_values(name):
    values = fields.get(name, {}).items()
    return {k: math.nan if v is None else float(v) for k, v in values}

  chance = read_values("chance").items()
  return Result(
    metrics=read_values("metrics"),
    protocol=dict(fields["protocol"]),
    # One that is not known is like none.
    chance={k: v for k, v in chance if math.isfinite(v)},
    units=fields.get("units", {}),
    lower=tuple(fields.get("lower", ())),
    errors=read_values("errors"),
  )


def _write(path: str | os.PathLike, content: Any) -> None:
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # JSON has no NaN: a missing metric is null.
  text = json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n"
  # Atomically: it is written again after each evaluation.
  atomic.write(path, text.encode())


def jsonable(value: Any) -> Any:
  """NumPy's numbers as Python's, arrays and tuples as lists, NaN as None."""
  if isinstance(value, Mapping):
    return {str(k): jsonable(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [jsonable(v) for v in value]
  if isinstance(value, np.generic | np.ndarray):
    return jsonable(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
