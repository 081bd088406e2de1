"""Reports of runs, encoders and label sets, as one HTML page and as Markdown.

`studies/page.py` reports studies.
"""
