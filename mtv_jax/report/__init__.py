"""Reports of runs, encoders and label sets, as HTML and as Markdown."""
