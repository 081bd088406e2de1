"""SVG charts: curves, values with intervals, heat maps.

Sizes are in CSS pixels and are not scaled, so that text keeps its size: every
chart but a wide heat map fits a phone. Colours are those of `html.THEME`, light
or dark. Marks have titles, which a browser shows under the pointer.
"""

from mtv_jax.utils.charts.base import Chart, to_file, write_files
from mtv_jax.utils.charts.heat_maps import heat_map
from mtv_jax.utils.charts.intervals import Row, interval_plot
from mtv_jax.utils.charts.lines import Series, line_chart, thin_out

__all__ = [
  "Chart",
  "Row",
  "Series",
  "heat_map",
  "interval_plot",
  "line_chart",
  "thin_out",
  "to_file",
  "write_files",
]
