"""Pages of blocks, as HTML and as Markdown with its files."""

import re
import urllib.parse

import numpy as np
from page_checks import Outline
from PIL import Image

from mtv_jax.report.charts import Row, interval_plot
from mtv_jax.report.page import (
  Bullets,
  Charts,
  Code,
  Details,
  Heading,
  ImageFile,
  Images,
  Note,
  PageFiles,
  Table,
  write_pages,
)

SCRIPT = "<script>alert('&lt;')</script>"


def test_text_is_no_html(tmp_path):
  blocks = [
    Heading(SCRIPT),
    Note(SCRIPT),
    Bullets([SCRIPT]),
    Table([["a|b", SCRIPT], [SCRIPT, "c\nd"]]),
    Details(SCRIPT, [Note(SCRIPT)]),
  ]
  write_pages(SCRIPT, blocks, tmp_path)
  page = Outline((tmp_path / "report.html").read_text())
  assert "script" not in page.tags
  assert page.headings == [SCRIPT, SCRIPT]
  text = (tmp_path / "report.md").read_text()
  assert "<" not in text and text.count("&lt;script>") == 8
  assert text.count("alert('&amp;lt;')") == 8  # Else it would be shown as "<".
  assert "| a\\|b |" in text and "| c d |" in text


def test_a_fence_is_longer_than_those_of_the_code():
  text = "a\n```\nb\n````c"
  assert Code(text).markdown(PageFiles()) == f"`````\n{text}\n`````"
  assert Code("a").markdown(PageFiles()) == "```\na\n```"


def test_files_of_one_name_are_told_apart(tmp_path):
  """Names of metrics and runs that differ in characters files don't have."""
  output = tmp_path / "my report (é)"
  source = output / "run [1]" / "evals" / "sheet.png"
  source.parent.mkdir(parents=True)
  Image.new("RGB", (2, 1), (9, 0, 0)).save(source)
  images = [
    ImageFile(f"a{i}", np.full((1, 1, 3), i, np.uint8), "sheets/a-b.png")
    for i in range(3)
  ]
  images += [
    ImageFile("a]b", np.zeros((1, 2, 3), np.uint8), path, source)
    for path in ("run [1]/evals/sheet.png", "sheets/a-b.png")
  ]
  charts = [
    interval_plot(title, [Row("a", 1.0)], name="same", unit="")
    for title in ("one", "two", "one")
  ]
  blocks = [Images(images), Charts(charts)]
  files = write_pages("Title", blocks, output)
  assert [path.name for path in files[:2]] == ["report.html", "report.md"]
  links = re.findall(r"\]\((\S*)\)", (output / "report.md").read_text())
  assert len(links) == 8
  paths = [output / urllib.parse.unquote(link) for link in links]
  assert {*paths} == {*files[2:]}
  pixels = [np.asarray(Image.open(path))[0, 0, 0] for path in paths[:5]]
  assert pixels == [0, 1, 2, 9, 9]
  titles = [re.search("<title>(.*?)<", p.read_text())[1] for p in paths[5:]]
  assert titles == ["one", "two", "one"]
  assert paths[5] == paths[7] != paths[6]
