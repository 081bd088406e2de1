"""SVG charts: scales, ticks, and the coordinates of marks."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from mtv_jax.report import charts
from mtv_jax.report.charts import Row, Scale, Series
from mtv_jax.report.labels import draw_histogram

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "a<script>&\"'\x00|b"


def parse(chart):
  """The chart's file, without its style."""
  return ET.fromstring(charts.to_file(chart))


def find(root, kind, css=None):
  return [
    e
    for e in root.iter(f"{SVG}{kind}")
    if css is None or css in e.get("class", "").split()
  ]


def heads(root):
  """The marks of values in an interval plot."""
  return [c for c in find(root, "circle") if c.get("r") == "4.5"]


def texts(root):
  return [e.text for e in root.iter(f"{SVG}text")]


def numbers(path):
  return [float(x) for x in re.findall(r"-?\d+\.?\d*", path)]


def test_scales_map_ends_and_logarithms():
  scale = Scale(1, 3, 10, 50)
  assert [scale(1), scale(2), scale(3)] == [10, 30, 50]
  log = Scale(1, 100, 0, 100, log=True)
  assert log(10) == pytest.approx(50)
  made = charts.make_scale([0, 10, np.nan], 0, 120, margin=0.1)
  assert (made.low, made.high) == (-1, 11)
  equal = charts.make_scale([2, 2], 0, 10, margin=0)
  assert (equal.low, equal.high, equal(2)) == (1.5, 2.5, 5)
  assert charts.make_scale([], 0, 1).high > charts.make_scale([], 0, 1).low
  log = charts.make_scale([-1, 4, 16], 0, 1, log=True, margin=0)
  assert (log.low, log.high) == (4, 16)


@pytest.mark.parametrize(
  ("low", "high", "log", "want"),
  [
    (0, 1, False, [0, 0.5, 1]),
    (0, 50, False, [0, 20, 40]),
    # No two multiples of the step of about four ticks.
    (57, 69, False, [60, 65]),
    (-0.3, 0.45, False, [-0.2, 0, 0.2, 0.4]),
    (1e3, 1e6, True, [1e3, 1e4, 1e5, 1e6]),
    (2, 40, True, [3, 10, 30]),
    # Less than a factor of two: as on a linear scale.
    (5.1, 5.9, True, [5.2, 5.4, 5.6, 5.8]),
  ],
)
def test_ticks_are_round_and_within_the_scale(low, high, log, want):
  ticks = charts.list_ticks(Scale(low, high, 0, 100, log))
  np.testing.assert_allclose(ticks, want, atol=1e-12)


def test_a_line_passes_through_its_points_and_stops_at_a_missing_one():
  points = [(0, 0.0), (1, 1.0), (2, None), (3, 4.0), (4, 2.0)]
  series = [Series("a", points, colour=2)]
  root = parse(charts.line_chart("loss", series, name="l", x_label="step"))
  (line,) = find(root, "path", "line")
  assert re.sub(r"[\d. ]", "", line.get("d")) == "MLML"
  x0, y0, x1, y1, x3, y3, x4, y4 = numbers(line.get("d"))
  # Equal steps, and heights in proportion to the values, upwards.
  assert x3 - x0 == pytest.approx(3 * (x1 - x0), abs=0.2)
  assert (y0 - y3) == pytest.approx(4 * (y0 - y1), abs=0.3)
  assert y4 == pytest.approx((y0 + y3) / 2, abs=0.2)
  assert 0 < x0 < x4 < charts.WIDTH
  assert find(root, "g", "c2") and not find(root, "g", "c0")
  assert {"loss", "step", "a"} <= {*texts(root)}
  assert len(find(root, "circle")) == 4


def test_chance_and_intervals_are_in_the_range():
  series = [
    Series("a", [(1, 5.0), (2, 6.0)], 0, [(1, 4, 6), (2, 5, 7)]),
    Series("b", [(1, 1.0), (2, 9.0)], 1, [(1, 0, 2), (2, 8, 10)], "dots"),
  ]
  chart = charts.line_chart("t", series, name="t", x_label="x", chance=-10)
  root = parse(chart)
  (line,) = find(root, "path", "chance")
  (area,) = find(root, "polygon", "band")
  bars = find(root, "path", "bar")
  assert len(bars) == 2
  y_chance = numbers(line.get("d"))[1]
  _, y_low, y_high = numbers(bars[0].get("d"))
  # 0 and 2 are 10 and 12 above chance; heights grow downwards.
  share = (y_chance - y_low) / (y_chance - y_high)
  assert share == pytest.approx(10 / 12, 1e-2)
  corners = np.reshape(numbers(area.get("points")), (4, 2))
  assert corners[:, 0].tolist() == [*corners[:2, 0], *corners[1::-1, 0]]
  assert (corners[:2, 1] < corners[:1:-1, 1]).all()


def test_logarithmic_lines_leave_out_zero():
  points = [(1, 1.0), (10, 0.0), (100, 100.0)]
  chart = charts.line_chart(
    "t", [Series("a", points)], name="t", x_label="x", log_x=True, log_y=True
  )
  (line,) = find(parse(chart), "path", "line")
  assert len(numbers(line.get("d"))) == 4


def test_interval_plot_coordinates():
  rows = [
    Row("a", 20.0, 10.0, 30.0, points=(15.0, 25.0), chance=5.0, note="better"),
    Row("b", None, chance=5.0),
    Row("c", 50.0, chance=5.0, colour=1),
  ]
  chart = charts.interval_plot("top1", rows, name="top1", unit="%", lower=True)
  root = parse(chart)
  marks = heads(root)
  a, c = (float(mark.get("cx")) for mark in marks)
  (bar,) = find(root, "path", "bar")
  low, _, high = numbers(bar.get("d"))[:3]
  assert (low + high) / 2 == pytest.approx(a, abs=0.1)
  assert (high - low) * 1.5 == pytest.approx(c - a, abs=0.2)
  chances = find(root, "path", "chance")
  assert len(chances) == 3
  x_chance = numbers(chances[0].get("d"))[0]
  assert (a - x_chance) * 2 == pytest.approx(c - a, abs=0.2)
  seeds = [float(e.get("cx")) for e in find(root, "circle", "seed")]
  assert np.mean(seeds) == pytest.approx(a, abs=0.1)
  title = marks[0].find(f"{SVG}title").text
  assert title == "a: 20 %, 10 to 30. better"
  assert {"–", "% · lower is better · dashed: chance"} <= {*texts(root)}


def test_intervals_of_percentages_end_at_0_and_100():
  rows = [Row("a", 60.0, -120.0, 240.0), Row("b", 30.0, 20.0, 40.0)]
  root = parse(charts.interval_plot("t", rows, name="t", unit="%"))
  a, b = heads(root)
  per_unit = (float(a.get("cx")) - float(b.get("cx"))) / 30
  low, _, high = numbers(find(root, "path", "bar")[0].get("d"))[:3]
  assert high - low == pytest.approx(100 * per_unit, abs=0.3)
  assert a.find(f"{SVG}title").text == "a: 60 %, -120 to 240"


def test_heat_map_cells():
  values = [[1.0, -0.5, None], [0.0, 0.25, float("nan")]]
  chart = charts.heat_map(
    "cosines", values, rows=["a", "b"], columns=["x", "y", "z"], name="c"
  )
  root = parse(chart)
  cells = find(root, "rect")
  css = [cell.get("class") for cell in cells]
  assert css == ["positive", "negative", "empty"] + ["positive"] * 2 + ["empty"]
  opacity = [float(c.get("fill-opacity", 0)) for c in cells]
  np.testing.assert_allclose(opacity[:2], [0.75, 0.375], atol=0.01)
  cell_texts = [e.text for e in find(root, "text", "cell")]
  assert cell_texts == ["1.00", "−0.50", "0.00", "0.25"]
  left = [float(c.get("x")) for c in cells]
  top = [float(c.get("y")) for c in cells]
  assert left[0] < left[1] < left[2] and left[:3] == left[3:]
  assert top[0] == top[2] < top[3]
  assert float(root.get("width")) >= left[2] + float(cells[2].get("width"))
  assert float(root.get("height")) >= top[3] + float(cells[3].get("height"))


@pytest.mark.parametrize(
  ("value", "limit", "want"),
  [(-0.001, 1, "0.00"), (12.34, 20, "12.3"), (3e5, 3e5, "3e+05")],
)
def test_cell_texts(value, limit, want):
  values, names = [[value]], dict(rows=["a"], columns=["b"])
  chart = charts.heat_map("title", values, name="n", limit=limit, **names)
  (cell,) = find(parse(chart), "text", "cell")
  assert cell.text == want


def test_histogram_bars():
  bars = {"edges": [0, 1, 2, 3], "counts": [1, 4, 0]}
  chart = draw_histogram({"bars": bars, "values": "real"}, "sizes")
  root = parse(chart)
  bars = find(root, "rect", "filled")
  heights = [float(bar.get("height")) for bar in bars]
  assert heights[0] * 4 == heights[1] and heights[2] == 0
  bottoms = {float(b.get("y")) + float(b.get("height")) for b in bars}
  assert len(bottoms) == 1
  titles = [bar.find(f"{SVG}title").text for bar in bars]
  assert titles[1] == "1 to 2: 4 (80 %)"
  assert {"0", "3", "largest bar: 4"} <= {*texts(root)}


def draw_each(text, value, low, high):
  """A chart of each kind, of a value with an interval."""
  points, interval = [(0, low), (1, value), (2, high)], [(0, low, high)]
  curve, row = Series(text, points, 0, interval), Row(text, value, low, high)
  names = dict(rows=[text], columns=[text, "b"], name="c")
  return (
    charts.line_chart(text, [curve], name="a", x_label=text),
    charts.interval_plot(text, [row, Row("b", low)], name="b", unit=text),
    charts.heat_map(text, [[value, low]], **names),
  )


def test_values_near_the_largest_float_are_left_out():
  drawn = draw_each("a", 1.0, -1.7e308, 1.7e308)
  for chart in drawn:
    assert not re.search(r"\b(nan|inf)\b", chart.svg)
  assert len(find(parse(drawn[0]), "circle")) == 1


def test_names_are_escaped():
  for chart in draw_each(HOSTILE, 1.0, 0.5, 2.0):
    root = parse(chart)  # Raises if the markup is broken.
    assert not list(root.iter(f"{SVG}script"))
    assert "a<script>" in "".join(root.itertext())


def test_thinned_curves_keep_their_mean():
  points = [(float(i), float(i % 7)) for i in range(1600)]
  thinned = charts.thin_out(points)
  assert len(thinned) == 160
  np.testing.assert_allclose(np.mean(thinned, 0), np.mean(points, 0))
  assert charts.thin_out(points[:160]) == points[:160]
