"""Conversion of model families, with safetensors and NumPy alone."""
