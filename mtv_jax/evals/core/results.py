"""Results of evaluations and their JSON files.

A file of one encoder is `{encoder, weights, mtv_jax, evals}`, as training
writes it, plus `{name, skipped, failed}` for several requested evaluations. A
file of several encoders is `{mtv_jax, encoders: [...]}` with one such entry
each.
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
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Results, skip reasons and errors of one encoder, by evaluation."""

  name: str  # for tables
  encoder: str  # path that it was loaded from
  weights: str  # `student`, `teacher` or `ema`
  results: dict[str, Result] = dataclasses.field(default_factory=dict)
  skipped: dict[str, str] = dataclasses.field(default_factory=dict)
  failed: dict[str, str] = dataclasses.field(default_factory=dict)
  # The encoder's own protocol; the protocols of results begin with it.
  protocol: dict[str, Any] = dataclasses.field(default_factory=dict)
  version: str = mtv_jax.__version__
  # The released checkpoint named by the user; see `evals/published.py`.
  checkpoint: str = ""


def write_json(
  path: str | os.PathLike, encoder: Encoder, results: Mapping[str, Result]
) -> None:
  """Writes one encoder's metrics, chance levels and protocols."""
  _dump(
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
  """Writes `STEM/SHEET.png` if `sheets`; metrics per resample to `STEM.npz`."""
  for name, file in _sheet_files(stem, result.sheets if sheets else ()).items():
    stem.mkdir(parents=True, exist_ok=True)
    plots.save_image(result.sheets[name], file)
  if result.resamples:
    stem.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # NumPy would add a suffix to a path.
    np.savez_compressed(buffer, **result.resamples)
    atomic.write(stem.with_name(f"{stem.name}.npz"), buffer.getvalue())


def read_resamples(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads metrics per resample from the .npz beside a JSON file, if any."""
  file = path.with_suffix(".npz")
  if not file.exists():
    return {}
  try:
    # Given a path, NumPy leaves a damaged file open.
    with np.load(io.BytesIO(file.read_bytes())) as stored:
      arrays = dict(stored)
    for name, array in arrays.items():
      if array.ndim != 1 or len(array) < 2 or array.dtype.kind != "f":
        raise ValueError(f"{name} is {array.dtype} {array.shape}")
    return arrays
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise InputError(
      f"{file} can't be read ({error}). Remove it; intervals are then "
      "computed from standard errors."
    ) from None


def read_sheets(
  stem: pathlib.Path, names: Sequence[str]
) -> dict[str, np.ndarray]:
  """Reads sheets from `write_arrays` by name, in the order of `names`."""
  sheets = {}
  for name, file in _sheet_files(stem, names).items():
    with Image.open(file) as image:
      sheets[name] = np.asarray(image.convert("RGB"))
  return sheets


def _sheet_files(stem: pathlib.Path, names: Iterable[str]) -> dict:
  """File of each sheet, such as `STEM/a-b.png` for "a b" or "a/b"."""
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
  """Writes outcomes of any number of encoders.

  `more` adds entries to the file of a single encoder.
  """
  encoders = []
  for outcome in outcomes:
    fields = dict(vars(outcome))
    fields["mtv_jax"] = fields.pop("version")
    results = fields.pop("results").items()
    fields["evals"] = {name: result.to_dict() for name, result in results}
    encoders.append(fields)
  content = {"mtv_jax": mtv_jax.__version__, "encoders": encoders}
  _dump(path, {**encoders[0], **more} if len(encoders) == 1 else content)


def read(path: str | os.PathLike) -> list[Outcome]:
  """Reads outcomes that `write` or `write_json` wrote, without sheets."""
  path = pathlib.Path(path)
  try:
    content = json.loads(path_lib.read_regular(path, limit=path_lib.MAX_JSON))
  except (ValueError, RecursionError) as error:
    raise InputError(
      f"{path} is not JSON ({error}). Evaluate again, or remove it."
    ) from None
  keys = sorted(content) if isinstance(content, dict) else type(content)
  if not isinstance(content, dict) or not {"encoders", "evals"} & {*content}:
    raise InputError(
      f"{path} contains {keys}; expected results of `evaluate` or of a run"
    )
  entries = content.get("encoders", [content])
  if not isinstance(entries, list):
    raise InputError(f'{path}: "encoders" is {entries!r:.60}, expected a list')
  return [_parse_outcome(path, entry, content) for entry in entries]


def _parse_outcome(
  path: pathlib.Path, entry: Mapping, content: Mapping
) -> Outcome:
  try:
    return Outcome(
      name=entry.get("name") or entry["encoder"] or path.stem,
      encoder=entry["encoder"],
      weights=entry["weights"],
      results={name: _parse_result(r) for name, r in entry["evals"].items()},
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


def _parse_result(fields: Mapping[str, Any]) -> Result:
  def read_values(name):
    values = fields.get(name, {}).items()
    return {k: math.nan if v is None else float(v) for k, v in values}

  chance = read_values("chance").items()
  return Result(
    metrics=read_values("metrics"),
    protocol=dict(fields["protocol"]),
    # A null chance level is unknown.
    chance={k: v for k, v in chance if math.isfinite(v)},
    units={k: str(v) for k, v in fields.get("units", {}).items()},
    lower=tuple(fields.get("lower", ())),
    errors=read_values("errors"),
    type=str(fields.get("type", "")),
    main=tuple(fields["main"]) if "main" in fields else None,
  )


def _dump(path: str | os.PathLike, content: Any) -> None:
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # JSON lacks NaN: a missing metric is null.
  text = json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n"
  # Atomic, since it is rewritten after each evaluation.
  atomic.write(path, text.encode())


def jsonable(value: Any) -> Any:
  """Converts to JSON types: arrays and tuples to lists, NaN to None."""
  if isinstance(value, Mapping):
    return {str(k): jsonable(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [jsonable(v) for v in value]
  if isinstance(value, np.generic | np.ndarray):
    return jsonable(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
