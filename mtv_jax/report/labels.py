"""Inspection of label sets: a page and statistics."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from flax.traverse_util import flatten_dict

from mtv_jax.config.options import PositiveInt, Range, check_value
from mtv_jax.data import registry
from mtv_jax.data.labels import label_sets
from mtv_jax.data.labels.join import JOINS, open_labels
from mtv_jax.experts import label_cards as cards
from mtv_jax.experts import label_statistics as statistics
from mtv_jax.experts.label_cards import Card, format_names
from mtv_jax.report import charts, page
from mtv_jax.report.charts import escape
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import ConfigError, check_choice
from mtv_jax.utils.text import (
  file_name,
  format_percent,
  format_setting,
  one_line,
)
from mtv_jax.utils.threads import map_ahead

_MAX_PHRASES = 5  # frequent phrases on the terminal
_MAX_NAMES = 8  # names per card shown without a click
_MAX_SETTING_CHARACTERS = 500
_BARS_SIZE = (276, 84)  # width and height of the bars of a histogram, in pixels
# Titles of the histograms.
_HISTOGRAMS = {
  "boxes": {
    "boxes_an_image": "boxes per image",
    "scores": "scores",
    "sides": "square root of the area",
    "shorter_sides": "shorter side",
    "longer_sides": "longer side",
    "words": "words per phrase",
  },
  "depth": {
    "labelled_pixels": "labelled fraction of the pixels",
    "low": "lowest inverse depth",
    "high": "highest inverse depth",
    "range": "range, fraction of the highest",
    "middle": "middle 90 %, fraction of the range",
  },
}
_LEGENDS = {
  "boxes": "Boxes: phrase and score; a score of 1 is not shown.",
  "depth": "Depth: <span class=ramp></span> from far to near;"
  " <span class=stripes></span> no label.",
}


def inspect_labels(
  data: Sequence[str],
  *,
  depth: str | os.PathLike | None = None,
  boxes: str | os.PathLike | None = None,
  out: str | os.PathLike,
  count: int = 24,
  seed: int = 0,
  size: int = 456,
  min_score: float | int = 0.0,
  records: int | None = None,
  index_dir: str | None = None,
  join: str = "aligned",
  progress: Callable[[str, int, int], None] = lambda kind, done, total: None,
) -> dict[str, Any]:
  """Writes `index.html` and `statistics.json`.

  Returns the statistics as written. Draws `count` random records; `size` is the
  longer side of an image. Boxes below `min_score` are ignored in
  images and statistics. The statistics read at most `records` evenly spaced
  labels per set: from the shards of `data` with `join="aligned"`, from the
  whole set with "key" (a set of a different copy of the images). `progress` is
  called with the kind, the number of labels read, and the total.
  """
  folders = {k: f for k, f in (("boxes", boxes), ("depth", depth)) if f}
  if not folders:
    raise ConfigError(
      "No label set is given: pass a folder of boxes, of depth, or of both."
    )
  check_value(count, PositiveInt, "count")
  check_value(size, Annotated[int, Range(min=64)], "size")
  check_choice("join", join, JOINS)
  source = registry.open_files(data, index_dir=index_dir, captions="optional")
  labels_by_kind = {
    kind: open_labels(source, kind, path=path, join=join, index_dir=index_dir)
    for kind, path in folders.items()
  }
  folder = Path(out).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  shards = {label_sets.shard_name(file) for file in source.files}
  stats = {
    kind: statistics.gather(
      labels.label_set,
      shards=shards if join == "aligned" else None,
      records=records,
      min_score=min_score,
      progress=functools.partial(progress, kind),
    )
    for kind, labels in labels_by_kind.items()
  }
  summary = {"data": list(data), "records": len(source), "sets": stats}
  summary["look_at"] = [x for s in stats.values() for x in statistics.find(s)]
  rng = np.random.default_rng(seed)
  record_indices = rng.choice(
    len(source), min(count, len(source)), replace=False
  )
  record_indices = sorted(record_indices.tolist())

  draw_card = functools.partial(
    cards.draw_card, source, labels_by_kind, size=size, min_score=min_score
  )
  text = render(summary, list(map_ahead(draw_card, record_indices)))
  atomic.write_text(folder / "index.html", text)
  text = json.dumps(summary, ensure_ascii=False, indent=1)
  atomic.write_text(folder / "statistics.json", f"{text}\n")
  atomic.remove_abandoned(folder)
  return summary


def format_summary(summary: Mapping[str, Any]) -> str:
  """Formats the statistics for a terminal."""
  lines = [f"{', '.join(summary['data'])}: {summary['records']:,} records"]
  for kind, stats in summary["sets"].items():
    share = format_percent(stats["labelled"] / max(stats["records"], 1))
    lines.append(f"{kind} {_count_labels(stats)} ({share})")
    rows = list(describe(stats))
    if kind == "boxes":
      frequent = stats["phrases"]["most_frequent"][:_MAX_PHRASES]
      text = ", ".join(f"{one_line(phrase)} {n:,}" for phrase, n in frequent)
      rows.append(("most frequent phrases", text))
    lines += [f"  {name:36} {text}" for name, text in rows]
  for finding in summary["look_at"]:
    lines.append(f"look at {finding['kind']}: {one_line(finding['text'])}")
  return "\n".join(lines)


def _count_labels(stats: Mapping[str, Any]) -> str:
  records = f"{stats['labelled']:,} of {stats['records']:,} records"
  return f"from {stats['folder']}: {records} have a label"


def render(summary: Mapping[str, Any], cards: Sequence[Card]) -> str:
  """Renders the HTML page: the summary of `inspect_labels`, and cards."""
  title = f"Labels of {', '.join(summary['data'])}"
  body = [page.Heading(title, level=1).html()]
  for kind, stats in summary["sets"].items():
    num_read = stats["read"]["records"]
    part = f" Statistics of {num_read:,} labels, evenly spaced."
    part = part if num_read < stats["records"] else ""
    body.append(f"<p><b>{kind}</b> {escape(_count_labels(stats))}.{part}</p>")
  items = "".join(
    f"<li><b>{finding['kind']}</b>: {escape(finding['text'])}"
    for finding in summary["look_at"]
  )
  body.append(
    f"<div class=warning><b>To look at</b><ul>{items}</ul></div>"
    if items
    else "<div class=ok>The statistics show nothing unusual.</div>"
  )
  if cards:
    note = f"{len(cards)} of {summary['records']:,} records."
    legend = " ".join(_LEGENDS[kind] for kind in summary["sets"])
    css_suffix = " several" if len(cards[0].images) > 1 else ""
    body += [f"<h2>Images</h2><p class=note>{note} {legend}</p>"]
    body += [f"<div class='cards{css_suffix}'>", *map(_render_card, cards)]
    body += ["</div>"]
  for kind, stats in summary["sets"].items():
    body += [page.Heading(kind.capitalize()).html(), *_render_statistics(stats)]
  return page.html_page(title, body, style=charts.read_css("labels"))


def _render_statistics(stats: Mapping[str, Any]) -> Iterator[str]:
  yield page.Table([("statistic", ""), *describe(stats)]).html()
  histograms = _list_histograms(stats).items()
  histogram_images = [
    draw_histogram(h, title) for title, h in histograms if h["count"]
  ]
  yield page.Charts(histogram_images).html()
  if stats.get("boxes"):
    yield _render_phrases(stats)
  if stats["reasons"]:
    rows = [(f"{n:,}", reason) for reason, n in stats["reasons"].items()]
    yield page.Note("From the manifest:").html()
    yield page.Table([("times", "dropped or changed"), *rows]).html()
  rows = [
    (name, format_setting(value, _MAX_SETTING_CHARACTERS))
    for name, value in flatten_dict(stats["settings"], sep=".").items()
  ]
  table = page.Table([("setting", ""), *rows])
  yield page.Details("Settings of the label set", [table]).html()


def _render_card(card: Card) -> str:
  images = "".join(
    page.html_image(image, f"{kind} of {card.key}")
    for kind, image in card.images.items()
  )
  lines = [f"<b>{escape(card.key)}</b> <span class=note>{card.size}</span>"]
  lines += [escape(caption) for caption in card.captions[:1]]
  lines += [f"<span class=note>{escape(note)}</span>" for note in card.notes]
  text = "".join(f"<div>{line}</div>" for line in lines)
  if more := card.captions[1:]:
    text += page.Details(
      f"{len(more)} more captions", [page.Bullets(more)]
    ).html()
  names = [f"<i>{escape(name)}</i> " for name in format_names(card.names)]
  if names:
    text += f"<div class=names>{''.join(names[:_MAX_NAMES])}</div>"
  if more := names[_MAX_NAMES:]:
    text += (
      f"<details><summary>{len(more)} more names</summary>"
      f"<div class=names>{''.join(more)}</div></details>"
    )
  return f"<figure><div class=images>{images}</div>{text}</figure>"


def describe(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Name and value of each statistic of a label set, as text."""
  sample = stats["read"]
  labelled = stats["labelled"] / max(stats["records"], 1)
  share = "all" if sample["every"] == 1 else f"one of {sample['every']:,}"
  yield "shards", f"{stats['shards']:,}"
  yield "records", f"{stats['records']:,}"
  yield "with a label", f"{stats['labelled']:,} ({format_percent(labelled)})"
  yield "labels read", f"{sample['records']:,}, {share}"
  if sample["damaged"]:
    yield "can't be read", f"{sample['damaged']:,}"
  if stats["kind"] == "boxes":
    yield from _describe_boxes(stats)
  else:
    yield "sides of the maps", ", ".join(map(str, stats["sides"]))
    yield "nearly constant maps", format_percent(stats["constant_maps"])
    yield (
      "maps whose range is due to few pixels",
      format_percent(stats["narrow_maps"]),
    )
  for title, histogram in _list_histograms(stats).items():
    text = "none"
    if histogram["count"]:
      text = f"mean {histogram['mean']:.3g}, {_spread(histogram['quantiles'])}"
      text += f", from {histogram['min']:.3g} to {histogram['max']:.3g}"
    yield title, text


def _describe_boxes(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  yield "boxes", f"{stats['boxes']:,}"
  if stats["min_score"] > 0:
    below = f"{stats['below_min_score']:,} below {stats['min_score']:g}"
    yield "boxes dropped by their score", below
  yield (
    "labelled images without a box",
    format_percent(stats["images_without_boxes"]),
  )
  if areas := stats["areas"]["quantiles"]:
    yield "area, fraction of the image", _spread(areas)
  large = f"boxes that cover more than {100 * statistics.LARGE_AREA:g} %"
  yield large, format_percent(stats["large_boxes"])
  small = f"boxes with a side below {100 * statistics.SMALL_SIDE:.1f} %"
  yield small, format_percent(stats["small_boxes"])
  phrases = stats["phrases"]
  about = "about " if phrases["counts_short_by"] else ""
  yield "different phrases", f"{about}{phrases['different']:,}"
  repeated = format_percent(stats["images_with_repeated_phrase"])
  yield "images with a phrase more than once", repeated


def _list_histograms(stats: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """Histograms of a label set by title."""
  values = {**stats, **stats.get("phrases", {})}
  titles = _HISTOGRAMS[stats["kind"]]
  return {title: values[name] for name, title in titles.items()}


def _spread(quantiles: Mapping[str, float]) -> str:
  low, median, high = (quantiles[q] for q in ("0.05", "0.5", "0.95"))
  return f"median {median:.3g}, 90 % in {low:.3g} to {high:.3g}"


def draw_histogram(histogram: Mapping[str, Any], title: str) -> charts.Chart:
  """Bar chart that shows each bar's label and count on hover."""
  edges, counts = histogram["bars"]["edges"], histogram["bars"]["counts"]
  pairs = list(itertools.pairwise(edges))
  ends = [(f"{a:.3g}", f"{b:.3g}") for a, b in pairs]
  if histogram["values"] == "whole":
    ends = [(f"{a + 0.5:.0f}", f"{b - 0.5:.0f}") for a, b in pairs]
  (width, height), largest = _BARS_SIZE, max(counts)
  pitch, bottom = width / len(counts), charts.TITLE + height
  parts = ["<g class='c0'>"]
  for i, (count, (low, high)) in enumerate(zip(counts, ends, strict=True)):
    label = low if low == high else f"{low} to {high}"
    text = f"{label}: {count:,} ({100 * count / sum(counts):.3g} %)"
    x, size = i * pitch, height * count / largest
    parts.append(
      f"<rect class='filled' x='{x:.1f}' y='{bottom - size:.1f}' "
      f"width='{max(pitch - 1, 1):.1f}' height='{size:.1f}'>"
      f"{charts.add_title(text)}</rect>"
    )
  parts.append(f"</g><path class='axis' d='M0 {bottom}H{width}'/>")
  for x, text, css in (
    (0, ends[0][0], "tick"),
    (width / 2, f"largest bar: {largest:,}", "tick middle"),
    (width, ends[-1][1], "tick end"),
  ):
    parts.append(charts.draw_text(x, bottom + 14, text, css))
  name = file_name("histogram", title)
  return charts.make_chart(title, name, width + 2, bottom + 18, parts)


def _render_phrases(stats: Mapping[str, Any]) -> str:
  """Renders the most frequent phrases with bars."""
  frequent = stats["phrases"]["most_frequent"]
  items = "".join(
    f"<li><span class=bar style='width:{100 * count / frequent[0][1]:.1f}%'>"
    f"</span><span>{escape(phrase)}</span> <span class=note>{count:,},"
    f" {format_percent(count / stats['boxes'])}</span>"
    for phrase, count in frequent
  )
  error = stats["phrases"]["counts_short_by"]
  note = f" Counts may be too low by {error:,}." if error else ""
  return (
    f"<p class=note>The {len(frequent)} most frequent phrases, as fractions of"
    f" the boxes.{note}</p><ol class=phrases>{items}</ol>"
  )
