"""Conversion of model families, using only safetensors and NumPy."""
