"""Checks of HTML pages: their outline, and how a browser lays them out."""

import html.parser
import re


class Outline(html.parser.HTMLParser):
  """Headings, texts and addresses of a page; checks that tags are closed."""

  def __init__(self, text):
    super().__init__()
    self.open, self.headings, self.addresses = [], [], []
    self.tags = []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.open.append(tag)
    self.addresses += [v for k, v in attributes if k in ("src", "href")]

  def handle_endtag(self, tag):
    if tag in self.open:
      while self.open.pop() != tag:
        pass

  def handle_data(self, data):
    if self.open and self.open[-1] in ("h1", "h2", "h3"):
      self.headings.append(data)


# Elements that scroll, and texts of charts outside the window.
_CUT = """[
  ...[...document.querySelectorAll('.wide, .charts > div, section')].filter(
    e => e.scrollWidth > e.clientWidth + 1),
  ...[...document.querySelectorAll('svg text')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.left < 0 || box.right > innerWidth; }),
].map(e => e.textContent.slice(0, 80))"""


def check_layout(browser, path, width, *, dark=False):
  """The page logs nothing, fits the window, and draws every chart."""
  browser.open(path, width=width, dark=dark)
  browser.evaluate(
    "document.querySelectorAll('details').forEach(d => d.open = true)"
  )
  content, boxes, colour = browser.evaluate(
    """[document.documentElement.scrollWidth,
      [...document.querySelectorAll('svg')].map(svg => {
        const box = svg.getBoundingClientRect();
        return Math.min(box.width, box.height);
      }),
      getComputedStyle(document.body).backgroundColor]"""
  )
  assert browser.messages == []
  assert content <= width
  assert boxes and min(boxes) > 50
  red = int(re.search(r"\d+", colour)[0])
  assert red < 60 if dark else red > 240
  if width < 600:
    assert browser.evaluate(_CUT) == []
