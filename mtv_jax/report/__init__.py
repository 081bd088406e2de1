"""Reports on one HTML page, and as Markdown with its images.

Pages of runs, of evaluated encoders and of label sets; `studies/page.py` has a
study's.
"""
