"""CSS of pages and SVG charts, and HTML escaping."""

from __future__ import annotations

import html
from typing import Any


def escape(text: Any) -> str:
  """Escapes text and attributes; lone surrogates become `?`."""
  return html.escape(str(text).encode("utf-8", "replace").decode())


# Light and dark colours. Series use the colour-blind-safe palette of Okabe and
# Ito (2008) without black and yellow, lightened on dark pages.
THEME = """:root { color-scheme: light dark; --paper: #fff; --ink: #18181c;
  --muted: #5a5a64; --line: #dcdce2; --link: #0050a0; --raised: #f5f5f8;
  --positive: #0072b2; --negative: #d55e00;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #e69f00;
  --c4: #cc79a7; --c5: #56b4e9; --c6: #8c564b; --c7: #77777f; }
@media (prefers-color-scheme: dark) { :root { --paper: #15161b;
  --ink: #e6e6ea; --muted: #a6a6b2; --line: #373a44; --link: #84baf2;
  --raised: #1f2128; --positive: #2b86c9; --negative: #cf6320;
  --c0: #4fa6e6; --c1: #f58442; --c2: #2ec49a; --c3: #f2bc45;
  --c4: #e3a0c6; --c5: #9bd6fa; --c6: #c79486; --c7: #b4b4be; } }
"""
COLOURS = 8

# CSS of SVG charts, see `charts`.
SVG_STYLE = """svg.chart { font: 12px system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow: visible; }
svg.chart text { fill: var(--ink); } svg.chart .title { font-weight: 600;
  font-size: 13px; } svg.chart .tick { fill: var(--muted); }
svg.chart .end { text-anchor: end; } svg.chart .middle { text-anchor: middle; }
svg.chart path { fill: none; stroke: currentColor; }
svg.chart circle { fill: currentColor; }
svg.chart .grid { stroke: var(--line); }
svg.chart .axis { stroke: var(--muted); }
svg.chart .chance { stroke: var(--muted); stroke-dasharray: 3 3;
  stroke-width: 1.5; }
svg.chart .line { stroke-width: 1.8; stroke-linejoin: round; }
svg.chart .dashed { stroke-dasharray: 5 4; stroke-width: 1.4; }
svg.chart .bar { stroke-width: 1.6; } svg.chart .leader { opacity: .6; }
svg.chart .band { fill: currentColor; opacity: .16; }
svg.chart .seed { opacity: .4; }
svg.chart .hollow { fill: var(--paper); stroke: currentColor;
  stroke-width: 1.6; }
svg.chart .positive { fill: var(--positive); }
svg.chart .negative { fill: var(--negative); }
svg.chart .empty { fill: none; stroke: var(--line); }
svg.chart rect { stroke: var(--line); }
svg.chart .filled { fill: currentColor; stroke: none; }
""" + "".join(
  f"svg.chart .c{k} {{ color: var(--c{k}); }}\n" for k in range(COLOURS)
)

PAGE_STYLE = """body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 1180px; margin: 2em auto;
  padding: 0 1.2em; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
h3 { font-size: 1em; margin-top: 1.5em; }
table { border-collapse: collapse; margin: .6em 0; }
th, td { text-align: left; vertical-align: top; padding: .18em .9em .18em 0;
  max-width: 48em; overflow-wrap: break-word; }
th { border-bottom: 2px solid var(--ink); }
th, td:first-child { white-space: nowrap; }
.n { text-align: right; padding-left: .5em; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.note { color: var(--muted); max-width: 56em; }
.wide { overflow-x: auto; } .lines { white-space: nowrap; }
img { max-width: 100%; height: auto; }
figure { margin: 0 0 1.2em; break-inside: avoid; }
figure img { background: #fff; border-radius: 4px; }
figcaption { color: var(--muted); }
.columns { column-gap: 1.2em; }
.charts { display: flex; flex-wrap: wrap; gap: 1.2em 1.8em; align-items: start;
  margin: .8em 0; }
.charts > div { overflow-x: auto; max-width: 100%; }
.charts svg { display: block; }
pre { background: var(--raised); padding: .7em; white-space: pre-wrap;
  font-size: 13px; }
summary { cursor: pointer; color: var(--link); }
a { color: var(--link); text-decoration: none; }
.swatch { display: inline-block; width: .7em; height: .7em; margin-right: .4em;
  border-radius: 50%; }
.headlines { display: grid; gap: .9em; margin: .8em 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); }
.headlines section { border: 1px solid var(--line); border-radius: 6px;
  padding: .7em .9em; background: var(--raised); }
.headlines h3, .headlines p { margin: 0 0 .25em; }
.headlines b { font-size: 1.9em; line-height: 1.2; }
@media (max-width: 600px) {
  body { margin: 1em auto; padding: 0 1em; }
  td { overflow-wrap: anywhere; }
  td:first-child { white-space: normal; min-width: 8em; }
  .stacked tr:first-child { display: none; }
  .stacked, .stacked tbody, .stacked tr, .stacked td { display: block;
    max-width: none; text-align: left; padding: 0; }
  .stacked tr { padding: .4em 0; border-bottom: 1px solid var(--line); }
  .stacked td { white-space: normal; }
  .stacked td:first-child { font-weight: 600; }
  .lines { white-space: normal; }
  .stacked td[data-head]::before { content: attr(data-head) ": ";
    color: var(--muted); }
}
"""
