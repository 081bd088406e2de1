"""SVG charts: curves, values with intervals, heat maps, histograms.

Sizes are in CSS pixels and are not scaled, so that text keeps its size: every
chart but a wide heat map fits a phone. Colours are those of `style.THEME`,
light or dark. Marks have titles, which a browser shows under the pointer.
"""

from mtv_jax.report.charts.base import Chart, is_drawn, to_file, write_files
from mtv_jax.report.charts.lines import Series, line_chart, thin_out
from mtv_jax.report.charts.rows import Row, heat_map, histogram, interval_plot

__all__ = [
  "Chart",
  "Row",
  "Series",
  "heat_map",
  "histogram",
  "interval_plot",
  "is_drawn",
  "line_chart",
  "thin_out",
  "to_file",
  "write_files",
]
