"""Page about label sets: cards, statistics and settings, self-contained."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtv_jax.data.labels.label_sets import flatten
from mtv_jax.experts.inspection import statistics
from mtv_jax.experts.inspection.cards import Card, count_names
from mtv_jax.experts.inspection.findings import percent
from mtv_jax.utils import html
from mtv_jax.utils.html import escape

_NAMES = 8  # names per card that are shown without a click
_VALUE = 500  # characters of a setting
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
  "boxes": "Boxes: phrase and score; no score is a score of 1.",
  "depth": "Depth: <span class=ramp></span> from far to near;"
  " <span class=stripes></span> no label.",
}


def render(summary: Mapping[str, Any], cards: Sequence[Card]) -> str:
  """The page as HTML: the summary of `inspect`, and cards of some records."""
  title = f"Labels of {', '.join(summary['data'])}"
  body = [html.heading(title, level=1)]
  for kind, stats in summary["sets"].items():
    read = stats["read"]["records"]
    part = f" Statistics of {read:,} labels, evenly spaced."
    body.append(
      f"<p><b>{kind}</b> from {escape(stats['folder'])}:"
      f" {stats['labelled']:,} of {stats['records']:,} records have a label."
      f"{part if read < stats['records'] else ''}</p>"
    )
  body.append(_render_findings(summary["look_at"]))
  if cards:
    note = f"{len(cards)} of {summary['records']:,} records."
    legend = " ".join(_LEGENDS[kind] for kind in summary["sets"])
    several = " several" if len(cards[0].images) > 1 else ""
    body += [f"<h2>Images</h2><p class=note>{note} {legend}</p>"]
    body += [f"<div class='cards{several}'>", *map(_render_card, cards)]
    body += ["</div>"]
  for kind, stats in summary["sets"].items():
    body += [html.heading(kind.capitalize()), *_render_statistics(stats)]
  return html.page(title, body, style=_STYLE)


def _render_statistics(stats: Mapping[str, Any]) -> Iterator[str]:
  yield html.table([("statistic", ""), *describe(stats)])
  charts = "".join(
    _render_histogram(histogram, title)
    for title, histogram in _histograms(stats).items()
    if histogram["count"]
  )
  yield f"<div class=charts>{charts}</div>"
  if stats.get("boxes"):
    yield _render_phrases(stats)
  if stats["reasons"]:
    rows = [(f"{n:,}", reason) for reason, n in stats["reasons"].items()]
    yield html.note("From the manifest:")
    yield html.table([("times", "dropped or changed"), *rows])
  rows = [("setting", "")]
  for name, value in flatten(stats["settings"]):
    text = value if isinstance(value, str) else json.dumps(value)
    rows.append((name, text[:_VALUE] + "…" * (len(text) > _VALUE)))
  yield html.details("Settings of the label set", [html.table(rows)])


def _render_findings(findings: Sequence[Mapping[str, str]]) -> str:
  if not findings:
    return "<div class=ok>The statistics show nothing unusual.</div>"
  items = "".join(
    f"<li><b>{finding['kind']}</b>: {escape(finding['text'])}"
    for finding in findings
  )
  return f"<div class=warning><b>To look at</b><ul>{items}</ul></div>"


def _render_card(card: Card) -> str:
  images = "".join(
    html.image(image, f"{kind} of {card.key}")
    for kind, image in card.images.items()
  )
  lines = [f"<b>{escape(card.key)}</b> <span class=note>{card.size}</span>"]
  lines += [escape(caption) for caption in card.captions[:1]]
  lines += [f"<span class=note>{escape(note)}</span>" for note in card.notes]
  text = "".join(f"<div>{line}</div>" for line in lines)
  if more := card.captions[1:]:
    text += html.details(f"{len(more)} more captions", [html.bullets(more)])
  names = [f"<i>{escape(name)}</i> " for name in count_names(card.names)]
  if names:
    text += f"<div class=names>{''.join(names[:_NAMES])}</div>"
  if more := names[_NAMES:]:
    inner = f"<div class=names>{''.join(more)}</div>"
    text += html.details(f"{len(more)} more names", [inner])
  return f"<figure><div class=images>{images}</div>{text}</figure>"


def describe(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Name and value of each statistic of a label set, as text."""
  read = stats["read"]
  labelled = stats["labelled"] / max(stats["records"], 1)
  every = "all" if read["every"] == 1 else f"one of {read['every']:,}"
  yield "shards", f"{stats['shards']:,}"
  yield "records", f"{stats['records']:,}"
  yield "with a label", f"{stats['labelled']:,} ({percent(labelled)})"
  yield "labels read", f"{read['records']:,}, {every}"
  if read["damaged"]:
    yield "can't be read", f"{read['damaged']:,}"
  if stats["kind"] == "boxes":
    yield from _describe_boxes(stats)
  else:
    yield "sides of the maps", ", ".join(map(str, stats["sides"]))
    yield "nearly constant maps", percent(stats["constant_maps"])
    yield "maps whose range is of a few pixels", percent(stats["narrow_maps"])
  for title, histogram in _histograms(stats).items():
    if histogram["count"]:
      yield (
        title,
        f"mean {histogram['mean']:.3g}, {_spread(histogram['quantiles'])}, from"
        f" {histogram['min']:.3g} to {histogram['max']:.3g}",
      )
    else:
      yield title, "none"


def _describe_boxes(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  yield "boxes", f"{stats['boxes']:,}"
  if stats["min_score"] > 0:
    below = f"{stats['below_min_score']:,} below {stats['min_score']:g}"
    yield "boxes dropped by their score", below
  yield "labelled images without a box", percent(stats["images_without_boxes"])
  if areas := stats["areas"]["quantiles"]:
    yield "area, fraction of the image", _spread(areas)
  large = f"boxes that cover more than {100 * statistics.LARGE_AREA:g} %"
  yield large, percent(stats["large_boxes"])
  small = f"boxes with a side below {100 * statistics.SMALL_SIDE:.1f} %"
  yield small, percent(stats["small_boxes"])
  phrases = stats["phrases"]
  about = "about " if phrases["counts_short_by"] else ""
  yield "different phrases", f"{about}{phrases['different']:,}"
  repeated = percent(stats["images_with_repeated_phrase"])
  yield "images with a phrase more than once", repeated


def _histograms(stats: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """The histograms of a label set by title."""
  values = {**stats, **stats.get("phrases", {})}
  titles = _HISTOGRAMS[stats["kind"]]
  return {title: values[name] for name, title in titles.items()}


def _spread(quantiles: Mapping[str, float]) -> str:
  low, median, high = (quantiles[q] for q in ("0.05", "0.5", "0.95"))
  return f"median {median:.3g}, 90 % in {low:.3g} to {high:.3g}"


def _render_histogram(histogram: Mapping[str, Any], title: str) -> str:
  """A bar chart, with the count of each bar in its tooltip."""
  edges, counts = histogram["bars"]["edges"], histogram["bars"]["counts"]
  ends = [(f"{a:.3g}", f"{b:.3g}") for a, b in itertools.pairwise(edges)]
  if histogram["values"] == "whole":
    pairs = itertools.pairwise(edges)
    ends = [(f"{a + 0.5:.0f}", f"{b - 0.5:.0f}") for a, b in pairs]
  bars = "".join(
    f"<i style='height:{100 * count / max(counts):.1f}%'"
    f" title='{low}{f' to {high}' * (low != high)}: {count:,}"
    f" ({100 * count / histogram['count']:.3g} %)'></i>"
    for (low, high), count in zip(ends, counts, strict=True)
  )
  return (
    f"<div class=chart><b>{escape(title)}</b><div class=bars>{bars}</div>"
    f"<span>{ends[0][0]}</span><span>largest bar: {max(counts):,}</span>"
    f"<span>{ends[-1][1]}</span></div>"
  )


def _render_phrases(stats: Mapping[str, Any]) -> str:
  """The most frequent phrases with bars."""
  frequent = stats["phrases"]["most_frequent"]
  items = "".join(
    f"<li><span class=bar style='width:{100 * count / frequent[0][1]:.1f}%'>"
    f"</span><span>{escape(phrase)}</span> <span class=note>{count:,},"
    f" {percent(count / stats['boxes'])}</span>"
    for phrase, count in frequent
  )
  error = stats["phrases"]["counts_short_by"]
  note = f" Counts may be too low by {error:,}." if error else ""
  return (
    f"<p class=note>The {len(frequent)} most frequent phrases, as fractions of"
    f" the boxes.{note}</p><ol class=phrases>{items}</ol>"
  )


_STYLE = """.warning, .ok { border-left: 4px solid #d98200; padding: .5em 1em;
  background: var(--raised); margin: 1em 0; }
.ok { border-color: #2e8b57; background: var(--raised); }
.warning ul { margin: .3em 0; padding-left: 1.2em; }
.cards { display: grid; gap: 1.4em 1.2em;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.cards.several {
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); }
.cards figure { margin: 0; overflow-wrap: anywhere; }
.images { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: .3em; }
.images img { flex: 1 1 220px; min-width: 0; height: auto; max-height: 400px;
  object-fit: contain; object-position: left top; }
.names { margin: .25em 0; }
.names i { font-style: normal; background: var(--raised); border-radius: 3px;
  padding: 0 .35em; margin: 0 .15em .15em 0; display: inline-block; }
details ul { margin: .2em 0; padding-left: 1.2em; }
.charts { display: grid; gap: 1em;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); }
.chart { display: flex; flex-wrap: wrap; justify-content: space-between;
  font-size: .8em; }
.chart b, .bars { width: 100%; }
.bars { display: flex; align-items: end; gap: 1px; height: 6em;
  border-bottom: 1px solid var(--muted); }
.bars i { flex: 1; background: var(--c0); }
.phrases { columns: 260px; column-gap: 2em; padding-left: 2em; }
.phrases li { position: relative; break-inside: avoid; padding: .05em 0;
  overflow-wrap: anywhere; }
.phrases span { position: relative; }
.phrases .bar { position: absolute; left: 0; top: 0; bottom: 1px;
  background: var(--line); }
.ramp, .stripes { display: inline-block; width: 90px; height: .7em; }
.ramp { background: linear-gradient(90deg, #30123b, #4662d7, #36aaf9,
  #1ae4b6, #72fe5e, #c7ef34, #faba39, #f66b19, #cb2a04, #7a0403); }
.stripes { width: 30px; background: repeating-linear-gradient(135deg,
  #d6d6da 0 4px, #a0a0a6 4px 8px); }
@media (max-width: 640px) { th, td, td:first-child { white-space: normal;
  overflow-wrap: break-word; } td:first-child { min-width: 7em; } }
"""
