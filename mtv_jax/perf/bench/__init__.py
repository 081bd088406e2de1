"""What `tools/bench.py` measures, each beside its floor."""
