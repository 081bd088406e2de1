"""The top of a report: facts, training samples, and a figure per evaluation.

Differences and verdicts come from the page's tables.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.config.options import is_plugin
from mtv_jax.evals.core.base import evaluation_type, registered_class
from mtv_jax.evals.core.results import Outcome
from mtv_jax.report import page, tables
from mtv_jax.report.changes import Changes
from mtv_jax.report.contrasts import (
  BETTER,
  NOT_DISTINGUISHABLE,
  WORSE,
  Contrast,
  correct_by_key,
)
from mtv_jax.report.run_folders import SAMPLES, RunRecord, read_image
from mtv_jax.report.tables import MetricRow
from mtv_jax.utils import plots
from mtv_jax.utils.text import (
  file_name,
  format_duration,
  format_short,
  list_first,
)

_VERDICTS_NOTE = (
  "One figure per evaluation. ±: standard error over the test set. Chance is "
  "what random embeddings or guesses would give. Better and worse concern "
  "these encoders on the population of the test items: p, corrected for the "
  "main metrics of the page (Holm 1979), is below 0.05. They say nothing "
  "about the training: another seed gives another encoder, and two runs that "
  "differ only in the seed are often distinguishable."
)
_SAMPLES_NOTE = (
  "Rows of the first batch, as the model reads them. Depth: red is near, blue "
  "far, striped unlabelled."
)
_MAX_NAMES = 3  # Names in a sentence.
_MAX_WIDTH = 1200  # Width of an image on the page, in pixels.
_MIN_ITEMS = 30  # Test sets with fewer items get a warning.
# What the image grids of evaluations show, by name.
_IMAGE_GRIDS = {
  "captions": "the best captions of an image; green: its own",
  "images": "the best images for a caption; green frame: its own",
  "regions": "boxes with their phrase, and with the best phrase of all",
  "depth": "true and predicted depth; red is near, blue far, black unknown",
  "segmentation": "true and predicted classes",
  "zero_shot_segmentation": "true and predicted classes",
  "video_segmentation": "true and predicted objects",
  "matches": "matched points; green: correct",
  "pca": "patches in the colours of three principal components",
}
_METRICS = {
  "abs_rel": "absolute relative error",
  "rmse": "root mean square error",
  "avg_recall": "average recall",
  "miou": "mean IoU",
}
# Protocol entries that state the size of a test set.
_SIZE_KEYS = ("images", "captions", "boxes", "pairs", "points", "videos")


def merge_facts(facts: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
  """The known facts of runs or encoders by name: a header, then a row per fact.

  If values differ, a cell has a line per name. Empty values are unknown.
  """
  rows = [["fact", "value"]]
  for key in dict.fromkeys(key for entry in facts.values() for key in entry):
    values = {name: entry.get(key, "") for name, entry in facts.items()}
    texts = {*values.values()}
    if len(texts) > 1:
      lines = (f"{n}: {v or tables.EMPTY}" for n, v in values.items())
      texts = ["\n".join(lines)]
    rows += [[key, text] for text in texts if text]
  return rows


def read_facts(run: RunRecord, *, timed: bool = True) -> dict[str, str]:
  """Data, model, hardware, time, date, revision and seed; "" if unknown.

  Without `timed`, skips facts that depend on the machine.
  """
  session = run.sessions[-1] if run.sessions else {}
  facts = {"training data": _describe_data(run, session)}
  facts["labels"] = _describe_coverage(run.samples)
  facts["objectives"] = ", ".join(run.config.get("objectives") or ())
  facts["model"] = _describe_model(run.config, session)
  if timed:
    facts["hardware"] = _describe_hardware(session)
    facts["time"] = _describe_time(run, session)
    facts["date"] = _describe_dates(run.sessions)
    facts["revision"] = _describe_revision(session)
  return {**facts, "seed": str(run.seed)}


def _describe_data(run: RunRecord, session: Mapping[str, Any]) -> str:
  """Sources with their numbers of images, and images seen."""
  batch, steps = run.config.get("batch_size") or 0, run.step
  seen = f"{steps * batch:,} seen in {steps:,} steps of {batch:,}"
  if sources := session.get("data"):
    records = sum(s["records"] for s in sources)
    named = [f"{s['records']:,} in {s['name']}" for s in sources]
    seen += f" ({steps * batch / records:.2g} epochs)"
    return f"{records:,} images: {list_first(named, _MAX_NAMES)}; {seen}"
  return seen


def _describe_coverage(samples: Mapping[str, Any]) -> str:
  """Share of labelled images in the first batch, by kind."""
  rows = samples.get("rows", 0)
  shares = [
    f"{kind} {100 * count / rows:.0f} %"
    for kind, count in samples.get("labelled", {}).items()
  ]
  return f"{', '.join(shares)} of the first {rows:,} images" if shares else ""


def _describe_model(
  config: Mapping[str, Any], session: Mapping[str, Any]
) -> str:
  model = config.get("model") or {}
  text = model.get("text") or {}
  name = f"ViT {model.get('variant', '')}".strip()
  name += f", {model['image_size']} pixels" if "image_size" in model else ""
  name += f", text tower {text['variant']}" if text.get("variant") else ""
  counts = session.get("parameters")
  if not counts:
    return name if model else ""
  parts = ", ".join(f"{k} {format_short(n)}" for k, n in counts.items())
  return f"{name}: {format_short(sum(counts.values()))} parameters ({parts})"


def _describe_hardware(session: Mapping[str, Any]) -> str:
  if not (kind := session.get("device_kind")):
    return ""
  name = f"{session['devices']:,} × {kind}"
  if kind.lower() == "cpu":
    name = f"CPU, {session.get('cores', session['devices'])} cores"
  processes = session["processes"]
  return name + f", {processes} processes" * (processes > 1)


def _describe_time(run: RunRecord, session: Mapping[str, Any]) -> str:
  """Wall time of all sessions, and device hours of training steps."""
  wall = datetime.timedelta()
  for entry in run.sessions:
    with contextlib.suppress(TypeError, ValueError):  # None, "unknown".
      times = entry.get("started"), entry.get("ended")
      start, end = map(datetime.datetime.fromisoformat, times)
      wall += end - start
  parts = [f"{format_duration(wall.total_seconds())} of wall time"] * bool(wall)
  hours = [v for _, v in run.series.get("speed/core_hours", ())][-1:]
  kind = str(session.get("device_kind", "")).lower()
  unit, devices = "chip-hours", session.get("devices", 1)
  if kind == "cpu":
    # Devices of a CPU share its cores.
    cores = session.get("cores", devices) * session["processes"]
    unit, hours = "core-hours", [h * cores / devices for h in hours]
  parts += [f"{h:.2g} {unit} of training steps" for h in hours]
  return ", ".join(parts)


def _describe_dates(sessions: Sequence[Mapping[str, Any]]) -> str:
  """Dates in UTC, to the minute; `read_sessions` returns ISO 8601."""
  times = [s.get(name) for s in sessions for name in ("started", "ended")]
  times = sorted(
    t[:16].replace("T", " ") for t in times if t and t != "unknown"
  )
  count = f", {len(sessions)} sessions" * (len(sessions) > 1)
  return f"{times[0]} to {times[-1]} UTC{count}" if times else ""


def _describe_revision(session: Mapping[str, Any]) -> str:
  if not (revision := session.get("revision")):
    return ""
  short = re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", revision)
  versions = session.get("packages") or {}
  named = [f"{k} {versions[k]}" for k in ("mtv_jax", "jax") if k in versions]
  digest = session.get("digest")
  return ", ".join([short, *named, *([f"code {digest}"] if digest else [])])


def load_image(
  title: str, source: pathlib.Path, output: pathlib.Path, *names: str
) -> page.ImageFile:
  """Loads an image of a run; `names` name its copy if outside of `output`."""
  source = source.resolve()
  image = read_image(source)
  if image.shape[1] > _MAX_WIDTH:
    longer_side = _MAX_WIDTH * max(image.shape[:2]) // image.shape[1]
    image = np.asarray(plots.fit_image(image, longer_side))
  path = f"sheets/{file_name(*names)}.png"
  if source.is_relative_to(output.resolve()):
    path = source.relative_to(output.resolve()).as_posix()
  return page.ImageFile(title, image, path, source)


def describe_samples(
  runs: Sequence[RunRecord], output: pathlib.Path
) -> Iterator[page.PageBlock]:
  """Training images with the captions, boxes and depth that the model reads.

  All come from the run with the most kinds of labels.
  """
  run = max(runs, key=lambda r: len(r.samples.get("labelled", ())))
  samples = [
    load_image(caption, file, output, run.name, "sample", str(i))
    for i, caption in enumerate(run.samples.get("captions", ()))
    if (file := (run.folder / SAMPLES).with_name(f"{i}.png")).exists()
  ]
  if samples:
    yield page.Heading("Training samples")
    yield page.Images(samples)
    yield page.Note(_SAMPLES_NOTE)


def name_evaluation(name: str, recorded: str = "") -> str:
  """A readable name: `val_retrieval` is "Image-text retrieval (val)".

  `recorded` is the type of the evaluation, if its result records it.
  """
  kind = evaluation_type(name, recorded)
  if is_plugin(kind):  # The entry's name, which may be `MODULE:NAME`.
    words = name.rpartition(":")[2].replace("_", " ")
    return words[:1].upper() + words[1:]
  title = registered_class(name, recorded).title
  suffix = name.replace(kind, "").strip("_").replace("_", " ")
  title = title or kind.replace("_", " ").capitalize()
  return f"{title} ({suffix})" if suffix else title


def name_metric(name: str) -> str:
  """A readable name: `text_to_image_r1` is "text to image recall at 1"."""
  if name in _METRICS:
    return _METRICS[name]
  name = re.sub(r"(^|_)r(\d+)$", r"\1recall_at_\2", name)
  name = re.sub(r"^top(\d+)", r"top-\1_accuracy", name)
  name = re.sub(r"_k(\d+)$", r", k = \1", name)
  return name.replace("_", " ").replace("iou", "IoU")


def name_row(row: tables.MetricRow) -> str:
  """A readable name of an evaluation's metric and protocol."""
  protocol = f" (protocol {row.variant})" if row.variant else ""
  title = name_evaluation(row.evaluation, row.kind)
  return f"{title}: {name_metric(row.metric)}{protocol}"


def describe_sheets(
  sheets: Iterable[tuple[str, str, page.ImageFile]],
) -> Iterator[page.PageBlock]:
  """Image grids of one encoder or of several.

  `sheets` are (readable name of the evaluation, name of the grid, image); the
  image's title is the encoder's name.
  """
  groups = collections.defaultdict(list)
  for evaluation, name, file in sheets:
    groups[evaluation, name].append(file)
  if not groups:
    return
  yield page.Heading("Held-out images")
  named = []
  for (evaluation, sheet), files in groups.items():
    content = _IMAGE_GRIDS.get(sheet, sheet.replace("_", " "))
    named.append((f"{evaluation}: {content}", files))
  if len({file.title for _, files in named for file in files}) == 1:
    yield page.Images([file._replace(title=title) for title, (file,) in named])
    return
  for title, files in named:
    yield page.Heading(title, level=3)
    yield page.Images(files)


def describe_headlines(
  rows: Sequence[MetricRow],
  outcomes: Mapping[str, Outcome | None],
  changes: Sequence[Changes] = (),
  *,
  note: str = _VERDICTS_NOTE,
) -> Iterator[page.PageBlock]:
  """One figure per evaluation with chance, differences and verdicts.

  `outcomes` are by the name of a column of `rows`, None if it has no results;
  `changes` are one run's changes since its start.
  """
  yield page.Heading("Results")
  main_rows: dict[tuple[str, int], MetricRow] = {}
  for row in rows:
    if row.is_main and any(v is not None for v in row.values):
      main_rows.setdefault((row.evaluation, row.variant), row)
  if not main_rows:
    yield page.Note("No evaluation has a result yet.")
    return
  latest = {c.metric.name: c.by_step[max(c.by_step)] for c in changes}
  names = [f"{row.evaluation}/{row.metric}" for row in main_rows.values()]
  latest = correct_by_key({name: latest.get(name) for name in names})
  yield page.Headlines(
    [
      _describe_row(row, outcomes, latest.get(name))
      for name, row in zip(names, main_rows.values(), strict=True)
    ]
  )
  yield page.Note(note)


def _describe_row(
  row: MetricRow,
  outcomes: Mapping[str, Outcome | None],
  change: Contrast | None,
) -> page.Headline:
  names = [*outcomes]
  with_value = [i for i, value in enumerate(row.values) if value is not None]
  protocol = outcomes[names[with_value[0]]].results[row.evaluation].protocol
  figures = [
    tables.format_value(value, row.unit, error, digits=1)
    for value, error in zip(row.values, row.errors, strict=True)
  ]
  if len(names) > 1:
    figures = [page.Swatch(f"{names[i]}: {figures[i]}", i) for i in with_value]
  counts = {k: v for k in _SIZE_KEYS if isinstance(v := protocol.get(k), int)}
  details = [", ".join(f"{count:,} {k}" for k, count in counts.items())]
  if row.chance is not None:
    chance = tables.format_value(row.chance, row.unit, digits=1)
    details.append(f"chance {chance}")
  sentences = [*_compare_with_chance(row, names)]
  if change is not None:
    text = tables.format_difference(change, unit=True)
    sentences.append(f"Change since the start: {text}: {change.verdict}.")
  for c in row.differences:
    if c.difference is not None:
      text = tables.format_difference(c, unit=True)
      verdict = f": {c.verdict}" * (c.p_holm is not None)
      sentences.append(f"{c.name}: {text}{verdict}.")
  if row.best is not None and not row.differences:
    sentences.append(f"Best: {names[row.best]}.")
  if counts and min(counts.values()) < _MIN_ITEMS:
    sentences.append("The test set is too small for a reliable verdict.")
  title = name_evaluation(row.evaluation, row.kind)
  title += f" (protocol {row.variant})" if row.variant else ""
  metric = name_metric(row.metric) + ", lower is better" * row.lower
  return page.Headline(
    title, metric, figures, "; ".join(filter(None, details)), sentences
  )


def _compare_with_chance(row: MetricRow, names: Sequence[str]) -> Iterator[str]:
  """Yields a sentence per verdict against chance."""
  groups = collections.defaultdict(list)
  for name, c in zip(names, row.over_chance, strict=bool(row.over_chance)):
    if c is None:
      continue
    preposition = "from" if c.verdict == NOT_DISTINGUISHABLE else "than"
    text = f"{c.verdict} {preposition} chance"
    if c.p is None:  # The error is 0 or unknown.
      text = (
        f"{BETTER if c.gain > 0 else WORSE} than chance, without an interval"
      )
      text = text if c.gain else "equal to chance"
    groups[text.capitalize()].append(name)
  for text, members in groups.items():
    named = f": {list_first(members, _MAX_NAMES)}" if len(names) > 1 else ""
    yield f"{text}{named}."
