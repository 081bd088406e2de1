"""Cards, statistics and settings on one page that needs no other file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtv_jax.experts.inspection import bars, statistics
from mtv_jax.experts.inspection.cards import Card, counted
from mtv_jax.experts.inspection.findings import percent
from mtv_jax.utils import html as html_pages
from mtv_jax.utils.html import escape

# Phrases of a card that are shown without a click.
_SHOWN = 8


def html(summary: Mapping[str, Any], cards: Sequence[Card]) -> str:
  """The page.

  Args:
    summary: what `run.inspect` gathered.
    cards: of some records.
  """
  title = f"Labels of {', '.join(summary['data'])}"
  body = [f"<h1>{escape(title)}</h1>", _first(summary), _look_at(summary)]
  if cards:
    of = f"{len(cards)} of {summary['records']:,} records"
    body += [f"<h2>Pictures</h2><p class=note>{of}. {_legend(summary)}</p>"]
    several = " several" if len(cards[0].pictures) > 1 else ""
    body += [f"<div class='cards{several}'>", *map(_card, cards), "</div>"]
  for kind, found in summary["sets"].items():
    body += [f"<h2>{kind.capitalize()}</h2>", _figures(found)]
    body += [f"<div class=bars>{''.join(_bars(found))}</div>"]
    if kind == "boxes" and found["boxes"]:
      body += [_phrases(found)]
    body += [_reasons(found), _settings(found)]
  return html_pages.page(title, body, style=_STYLE)


def _first(summary: Mapping[str, Any]) -> str:
  lines = []
  for kind, found in summary["sets"].items():
    read = found["read"]
    part = ""
    if read["records"] < found["records"]:
      part = f" Statistics are of {read['records']:,} labels, evenly spaced."
    lines.append(
      f"<p><b>{kind}</b> from {escape(found['folder'])}:"
      f" {found['labelled']:,} of {found['records']:,} records have a label."
      f"{part}</p>"
    )
  return "".join(lines)


def _look_at(summary: Mapping[str, Any]) -> str:
  if not summary["look_at"]:
    return "<div class=calm>Nothing stands out in the statistics.</div>"
  items = "".join(
    f"<li><b>{finding['kind']}</b>: {escape(finding['text'])}"
    for finding in summary["look_at"]
  )
  return f"<div class=look><b>To look at</b><ul>{items}</ul></div>"


def _legend(summary: Mapping[str, Any]) -> str:
  words = []
  if "boxes" in summary["sets"]:
    words.append("Boxes: phrase and score; no score is a score of 1.")
  if "depth" in summary["sets"]:
    words.append(
      "Depth: <span class=ramp></span> from far to near;"
      " <span class=stripes></span> no label."
    )
  return " ".join(words)


def _card(card: Card) -> str:
  pictures = "".join(
    html_pages.image(picture, f"{kind} of {card.key}", css="shot")
    for kind, picture in card.pictures.items()
  )
  lines = [f"<b>{escape(card.key)}</b> <span class=note>{card.size}</span>"]
  if card.captions:
    lines.append(escape(card.captions[0]))
  lines += [f"<span class=note>{escape(note)}</span>" for note in card.notes]
  texts = "".join(f"<div>{line}</div>" for line in lines)
  if more := card.captions[1:]:
    items = "".join(f"<li>{escape(caption)}" for caption in more)
    texts += _details(f"{len(more)} more captions", f"<ul>{items}</ul>")
  if card.names:
    words = [f"<i>{escape(name)}</i> " for name in counted(card.names)]
    texts += f"<div class=words>{''.join(words[:_SHOWN])}</div>"
    if rest := words[_SHOWN:]:
      inner = f"<div class=words>{''.join(rest)}</div>"
      texts += _details(f"{len(rest)} more names", inner)
  return f"<figure><div class=shots>{pictures}</div>{texts}</figure>"


def _details(summary: str, inner: str) -> str:
  return f"<details><summary>{summary}</summary>{inner}</details>"


def _figures(found: Mapping[str, Any]) -> str:
  of_kind = {"boxes": _box_figures, "depth": _depth_figures}[found["kind"]]
  read = found["read"]
  every = "all" if read["every"] == 1 else f"one of {read['every']:,}"
  rows = [
    ("shards", f"{found['shards']:,}"),
    ("records", f"{found['records']:,}"),
    (
      "with a label",
      f"{found['labelled']:,}"
      f" ({percent(found['labelled'] / max(found['records'], 1))})",
    ),
    ("labels read", f"{read['records']:,}, {every}"),
  ]
  if read["damaged"]:
    rows.append(("can't be read", f"{read['damaged']:,}"))
  return html_pages.table([("figure", ""), *rows, *of_kind(found)])


def _box_figures(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  yield "boxes", f"{found['boxes']:,}"
  if found["min_score"] > 0:
    least = f"{found['below_min_score']:,} below {found['min_score']:g}"
    yield "boxes left out by their score", least
  yield "boxes an image", spread(found["boxes_an_image"])
  yield "labelled images without a box", percent(found["images_without_boxes"])
  yield "scores", spread(found["scores"])
  areas = found["areas"]["quantiles"]
  if areas:
    yield "area, share of the image", _quantiles(areas)
  yield "shorter side, share of the image's", spread(found["shorter_sides"])
  yield "longer side", spread(found["longer_sides"])
  large = f"boxes that cover more than {100 * statistics.LARGE:g} %"
  yield large, percent(found["large_boxes"])
  small = f"boxes with a side below {100 * statistics.SMALL:.1f} %"
  yield small, percent(found["small_boxes"])
  yield "different phrases", different(found["phrases"])
  yield "words a phrase", spread(found["phrases"]["words"])
  repeated = percent(found["images_with_repeated_phrase"])
  yield "images with a phrase more than once", repeated


def _depth_figures(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  yield "sides of the maps", ", ".join(f"{side}" for side in found["sides"])
  yield "labelled share of the pixels", spread(found["labelled_pixels"])
  yield "least inverse depth", spread(found["low"])
  yield "greatest inverse depth", spread(found["high"])
  yield "range, share of the greatest", spread(found["range"])
  yield "5 % to 95 % of the pixels, share of the range", spread(found["middle"])
  yield "nearly constant maps", percent(found["constant_maps"])
  yield "maps whose range is of a few pixels", percent(found["narrow_maps"])


def spread(of: Mapping[str, Any]) -> str:
  """A quantity in a line: its mean, median and ends."""
  if not of["count"]:
    return "none"
  return (
    f"mean {of['mean']:.3g}, {_quantiles(of['quantiles'])}, from"
    f" {of['min']:.3g} to {of['max']:.3g}"
  )


def _quantiles(quantiles: Mapping[str, float]) -> str:
  low, middle, high = (quantiles[share] for share in ("0.05", "0.5", "0.95"))
  return f"median {middle:.3g}, 90 % in {low:.3g} to {high:.3g}"


def different(phrases: Mapping[str, Any]) -> str:
  """How many phrases there are, and how surely."""
  about = "about " if phrases["counts_short_by"] else ""
  return f"{about}{phrases['different']:,}"


def _bars(found: Mapping[str, Any]) -> Iterator[str]:
  names = {
    "boxes": {
      "boxes an image": found.get("boxes_an_image"),
      "scores": found.get("scores"),
      "side of a square of the box's area": found.get("sides"),
      "shorter side": found.get("shorter_sides"),
      "longer side": found.get("longer_sides"),
      "words a phrase": found.get("phrases", {}).get("words"),
    },
    "depth": {
      "labelled share of the pixels": found.get("labelled_pixels"),
      "least inverse depth": found.get("low"),
      "greatest inverse depth": found.get("high"),
      "5 % to 95 % of the pixels, share of the range": found.get("middle"),
    },
  }[found["kind"]]
  for title, histogram in names.items():
    if histogram["count"]:
      yield bars.svg(histogram, title)


def _phrases(found: Mapping[str, Any]) -> str:
  """The most frequent ones, with bars."""
  frequent = found["phrases"]["most_frequent"]
  top = frequent[0][1]
  items = "".join(
    f"<li><span class=bar style='width:{100 * count / top:.1f}%'></span>"
    f"<span>{escape(phrase)}</span> <span class=note>{count:,},"
    f" {percent(count / found['boxes'])}</span>"
    for phrase, count in frequent
  )
  short = found["phrases"]["counts_short_by"]
  least = f" Counts may be short by {short:,}." if short else ""
  head = f"The {len(frequent)} most frequent phrases, with shares of the boxes."
  return f"<p class=note>{head}{least}</p><ol class=phrases>{items}</ol>"


def _reasons(found: Mapping[str, Any]) -> str:
  if not found["reasons"]:
    return ""
  rows = [(f"{n:,}", reason) for reason, n in found["reasons"].items()]
  table = html_pages.table([("times", "left out or changed"), *rows])
  return f"<p class=note>From the manifest:</p>{table}"


def _settings(found: Mapping[str, Any]) -> str:
  rows = [("setting", ""), *_flat(found["settings"])]
  return _details("Settings of the label set", html_pages.table(rows))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
  if isinstance(value, Mapping) and value:
    for key, inner in value.items():
      yield from _flat(inner, f"{name}.{key}" if name else str(key))
    return
  text = value if isinstance(value, str) else json.dumps(value)
  yield name, text if len(text) <= 500 else text[:500] + "…"


_STYLE = """.look, .calm { border-left: 4px solid #d98200; padding: .5em 1em;
  background: #fff6e8; margin: 1em 0; }
.calm { border-color: #2e8b57; background: #eef8f1; }
.look ul { margin: .3em 0; padding-left: 1.2em; }
.cards { display: grid; gap: 1.4em 1.2em;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.cards.several {
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); }
.cards figure { margin: 0; overflow-wrap: anywhere; }
.shots { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: .3em; }
.shots img { flex: 1 1 220px; min-width: 0; height: auto; max-height: 400px;
  object-fit: contain; object-position: left top; }
.words { margin: .25em 0; }
.words i { font-style: normal; background: #eef1f5; border-radius: 3px;
  padding: 0 .35em; margin: 0 .15em .15em 0; display: inline-block; }
details ul { margin: .2em 0; padding-left: 1.2em; }
.bars { display: grid; gap: 1em;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); }
.bars svg { width: 100%; height: auto; }
.phrases { columns: 260px; column-gap: 2em; padding-left: 2em; }
.phrases li { position: relative; break-inside: avoid; padding: .05em 0;
  overflow-wrap: anywhere; }
.phrases span { position: relative; }
.phrases .bar { position: absolute; left: 0; top: 0; bottom: 1px;
  background: #dbe7f4; }
.ramp, .stripes { display: inline-block; width: 90px; height: .7em; }
.ramp { background: linear-gradient(90deg, #30123b, #4662d7, #36aaf9,
  #1ae4b6, #72fe5e, #c7ef34, #faba39, #f66b19, #cb2a04, #7a0403); }
.stripes { width: 30px; background: repeating-linear-gradient(135deg,
  #d6d6da 0 4px, #a0a0a6 4px 8px); }
@media (max-width: 640px) { th, td, td:first-child { white-space: normal;
  overflow-wrap: break-word; } td:first-child { min-width: 7em; } }
"""
