"""The head of a report: facts, training samples, and one figure an evaluation.

Verdicts are `contrasts.Contrast.verdict`, as in the tables of a page.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.data.labels.label_values import TOP, BoxLabel, DepthLabel
from mtv_jax.evals.core.base import registered_class
from mtv_jax.evals.core.results import Outcome
from mtv_jax.experts.inspection import cards
from mtv_jax.report import page, tables
from mtv_jax.report.changes import Changes
from mtv_jax.report.contrasts import (
  BETTER,
  WORSE,
  Contrast,
  correct_by_key,
)
from mtv_jax.report.labels import Cards
from mtv_jax.report.run_folders import SAMPLES, RunRecord, read_image
from mtv_jax.utils import plots
from mtv_jax.utils.text import (
  format_duration,
  format_metric,
  format_short,
  list_first,
)

VERDICTS_NOTE = (
  "One figure an evaluation, with its standard error over the test set. Chance "
  "is what random embeddings or guesses would give. Above, below, better and "
  "worse mean that the 95 % interval of the difference excludes 0 and p, "
  "corrected for the main metrics of the page (Holm 1979), is below 0.05."
)
_SAMPLE_SIZE = 208  # Longer side of a drawn training image, in pixels.
_MAX_NAMES = 3  # Names in a sentence.
_KINDS = {"caption": "captions", "depth": "depth", "box": "boxes"}
# What the sheets of evaluations show, by name.
_SHEETS = {
  "captions": "the best captions of an image; green: its own",
  "classes": "the best classes of an image; green: its own",
  "images": "the best images for a caption; green frame: its own",
  "regions": "boxes with their phrase, and with the best phrase of all",
  "depth": "true and predicted depth; red is near, blue far, black unknown",
  "matches": "matched points; green: correct",
  "pca": "patches in the colours of three principal components",
  "generated": "a generated caption; green: the annotated phrases",
}
_METRICS = {
  "abs_rel": "absolute relative error",
  "rmse": "root mean square error",
  "avg_recall": "average recall",
  "miou": "mean IoU",
}
# Numbers of a protocol that give the size of a test set.
_SIZES = ("images", "captions", "boxes", "pairs", "videos")


def read_facts(run: RunRecord, *, timed: bool = True) -> dict[str, str]:
  """Data, model, hardware, time, date, revision and seed; "" if unknown.

  Without `timed`, leaves out what depends on the machine.
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


def facts_table(runs: Sequence[RunRecord], *, timed: bool = True) -> page.Table:
  """The known facts of runs; where they differ, a line per run."""
  facts = {run.name: read_facts(run, timed=timed) for run in runs}
  rows = [["", ""]]
  for key in next(iter(facts.values())):
    values = {name: known[key] for name, known in facts.items()}
    lines = {v for v in values.values() if v}
    if len(lines) == 1:
      rows.append([key, *lines])
    elif lines:
      texts = [f"{n}: {v or tables.EMPTY}" for n, v in values.items()]
      rows.append([key, "\n".join(texts)])
  return page.Table(rows)


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
  """Shares of labelled images in the first batch."""
  shares = [
    f"{name} {100 * samples['labelled'][kind] / samples['rows']:.0f} %"
    for kind, name in _KINDS.items()
    if kind in samples.get("labelled", ())
  ]
  first = f" of the first {samples.get('rows', 0):,} images"
  return ", ".join(shares) + first if shares else ""


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
  if "device_kind" not in session:
    return ""
  processes, kind = session["processes"], session["device_kind"]
  hosts = f", {processes} processes" if processes > 1 else ""
  if kind.lower() != "cpu":
    return f"{session['devices']:,} × {kind}{hosts}"
  cores = session.get("cores")
  return f"CPU, {cores} cores{hosts}" if cores else f"CPU{hosts}"


def _describe_time(run: RunRecord, session: Mapping[str, Any]) -> str:
  """Wall time of all sessions, and device hours of training steps."""
  spans = [_read_times(s) for s in run.sessions]
  wall = sum(b.timestamp() - a.timestamp() for a, b in filter(all, spans))
  parts = [f"{format_duration(wall)} of wall time"] if wall else []
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
  times = [t for s in sessions for t in _read_times(s) if t]
  if not times:
    return ""
  first, last = min(times), max(times)
  form = "%H:%M" if first.date() == last.date() else "%Y-%m-%d %H:%M"
  text = f"{first:%Y-%m-%d %H:%M} to {last:{form}} UTC"
  return text + f", {len(sessions)} sessions" * (len(sessions) > 1)


def _read_times(session: Mapping[str, Any]) -> list[datetime.datetime | None]:
  """Start and end of a session; None if unknown."""
  times = []
  for name in ("started", "ended"):
    try:
      times.append(datetime.datetime.fromisoformat(session.get(name) or ""))
    except ValueError:
      times.append(None)
  return times


def _describe_revision(session: Mapping[str, Any]) -> str:
  if not (revision := session.get("revision")):
    return ""
  short = re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", revision)
  versions = session.get("packages") or {}
  named = [f"{k} {versions[k]}" for k in ("mtv_jax", "jax") if k in versions]
  digest = session.get("digest")
  return ", ".join([short, *named, *([f"code {digest}"] if digest else [])])


def describe_samples(run: RunRecord) -> Iterator[page.PageBlock]:
  """Training images with the captions, boxes and depth that the model reads."""
  drawn = [
    _draw_sample(run, i, sample)
    for i, sample in enumerate(run.samples.get("samples", ()))
    if (run.folder / SAMPLES).with_name(f"{i}.jpg").exists()
  ]
  if drawn:
    yield page.Heading("Training samples")
    yield Cards(drawn, 340)


def _draw_sample(
  run: RunRecord, i: int, sample: Mapping[str, Any]
) -> cards.Card:
  folder = (run.folder / SAMPLES).parent
  image = read_image(folder / f"{i}.jpg")
  image = np.asarray(plots.fit_image(image, _SAMPLE_SIZE))
  labels = {}
  if sample.get("boxes"):
    boxes = np.array(sample["boxes"], np.float32).reshape(-1, 4)
    ones = np.ones(len(boxes), np.float32)
    labels["boxes"] = BoxLabel(boxes, tuple(sample["phrases"]), ones)
  if (folder / f"{i}_depth.png").exists():
    depth = read_image(folder / f"{i}_depth.png")[..., 0]
    labels["depth"] = DepthLabel(depth * np.uint16(TOP // 255), 0.0, 1.0)
  card = cards.draw_labels(f"sample {i + 1}", image, labels)
  height, width = sample["size"]
  captions = (sample["caption"],) if "caption" in sample else ()
  return dataclasses.replace(
    card, notes=(), size=f"{width} x {height}", captions=captions
  )


def name_evaluation(name: str) -> str:
  """A readable name of an evaluation: `relative_depth` is "Relative depth"."""
  return registered_class(name).title or name.replace("_", " ").capitalize()


def name_metric(name: str) -> str:
  """A readable name of a metric: `text_to_image_r1` is with "recall at 1"."""
  if name in _METRICS:
    return _METRICS[name]
  name = re.sub(r"(^|_)r(\d+)$", r"\1recall_at_\2", name)
  name = re.sub(r"^top(\d+)", r"top-\1_accuracy", name)
  name = re.sub(r"_k(\d+)$", r", k = \1", name)
  return name.replace("_", " ").replace("iou", "IoU")


def name_row(row: tables.MetricRow) -> str:
  """A readable name of an evaluation's metric and protocol."""
  protocol = f" (protocol {row.variant})" if row.variant else ""
  return (
    f"{name_evaluation(row.evaluation)}: {name_metric(row.metric)}{protocol}"
  )


def describe_sheet(evaluation: str, sheet: str) -> str:
  """The title of a sheet, with what its rows show."""
  title = name_evaluation(evaluation)
  return f"{title}: {_SHEETS.get(sheet, sheet.replace('_', ' '))}"


def arrange_sheets(
  sheets: Mapping[str, Sequence[page.ImageFile]],
) -> Iterator[page.PageBlock]:
  """Sheets by title, of one encoder or of several side by side."""
  if sheets:
    yield page.Heading("Held-out images")
  if len({file.title for files in sheets.values() for file in files}) == 1:
    named = [f._replace(title=t) for t, (f,) in sheets.items()]
    sheets = {"": named}
  for title, files in sheets.items():
    if title:
      yield page.Heading(title, level=3)
    yield page.Images(files, columns=not title)


def measure_sets(outcomes: Iterable[Outcome]) -> dict[str, str]:
  """Sizes of test sets by evaluation: "1,000 images, 5,000 captions"."""
  sizes = {}
  for outcome in outcomes:
    for name, result in outcome.results.items():
      counts = {k: result.protocol.get(k) for k in _SIZES}
      known = {k: v for k, v in counts.items() if isinstance(v, int)}
      sizes.setdefault(name, ", ".join(f"{v:,} {k}" for k, v in known.items()))
  return sizes


def describe_headlines(
  rows: Sequence[tables.MetricRow],
  names: Sequence[str],
  sizes: Mapping[str, str],
  changes: Sequence[Changes] = (),
) -> Iterator[page.PageBlock]:
  """One figure an evaluation with chance and a verdict; empty without rows.

  `sizes` are the sizes of the test sets by evaluation, `changes` those of one
  run since its start.
  """
  chosen: dict[tuple[str, int], tables.MetricRow] = {}
  for row in rows:
    if row.is_main and any(v is not None for v in row.values):
      chosen.setdefault((row.evaluation, row.variant), row)
  if not chosen:
    return
  last = {c.metric.name: c.by_step[max(c.by_step)] for c in changes}
  shown = [f"{row.evaluation}/{row.metric}" for row in chosen.values()]
  last = correct_by_key({name: last.get(name) for name in shown})
  yield page.Heading("Results")
  yield page.Headlines(
    [
      _describe_row(row, names, sizes.get(row.evaluation, ""), last.get(name))
      for name, row in zip(shown, chosen.values(), strict=True)
    ]
  )
  yield page.Note(VERDICTS_NOTE)


def _describe_row(
  row: tables.MetricRow,
  names: Sequence[str],
  size: str,
  change: Contrast | None,
) -> page.Headline:
  known = [i for i, value in enumerate(row.values) if value is not None]
  several = len(names) > 1
  figures = [
    (names[i], _format_figure(row, i), i if several else None) for i in known
  ]
  metric = name_metric(row.metric) + ", lower is better" * row.lower
  details = [size] if size else []
  if row.chance is not None:
    chance = tables.format_value(row.chance, row.unit, digits=1)
    details.append(f"chance {chance}")
  sentences = _compare_with_chance(row, names)
  if change is not None:
    text = tables.format_difference(change)
    sentences.append(f"Change since the start: {text}, {change.verdict}.")
  sentences += _compare_columns(row, names)
  protocol = f" (protocol {row.variant})" if row.variant else ""
  title = name_evaluation(row.evaluation) + protocol
  return page.Headline(title, metric, figures, "; ".join(details), sentences)


def _format_figure(row: tables.MetricRow, i: int) -> str:
  """A value with its unit and standard error, such as "41.2 % ± 1.3"."""
  value, error = row.values[i], row.errors[i]
  text = tables.format_value(value, row.unit, digits=1)
  if error is None:
    return text
  number = format_metric(value, row.unit, error, digits=1)
  return f"{text} ± {number.partition(' ± ')[2]}"


def _compare_with_chance(
  row: tables.MetricRow, names: Sequence[str]
) -> list[str]:
  """A sentence for each verdict on chance."""
  groups: dict[str, list[str]] = collections.defaultdict(list)
  for name, c in zip(names, row.over_chance, strict=True):
    if c is None:
      continue
    text = c.compare_with("chance")
    if c.p is None:
      way = BETTER if c.gain > 0 else WORSE
      text = f"{way} than chance, with unknown error"
    groups[text].append(name)
  sentences = []
  for text, members in groups.items():
    if len(groups) == 1:
      text = f"All {text}" if len(members) > 1 else text.capitalize()
      sentences.append(f"{text}.")
    else:
      named = list_first(members, _MAX_NAMES)
      sentences.append(f"{text.capitalize()}: {named}.")
  return sentences


def _compare_columns(row: tables.MetricRow, names: Sequence[str]) -> list[str]:
  """Sentences on differences from the baseline, or on the best value."""
  sentences = [
    f"{c.arm} is {c.compare_with(c.baseline)}: {tables.format_difference(c)}."
    for c in row.differences
    if c.difference is not None
  ]
  known = sum(value is not None for value in row.values)
  if not row.differences and known > 1:
    best = f"Best: {names[row.best]}." if row.best is not None else ""
    sentences.append(best or "No value is better than every other.")
  return sentences
