"""Models of other libraries to ours and back, by safetensors and NumPy only."""
