"""Preflight: ahead-of-time compilation of a config for a topology."""
