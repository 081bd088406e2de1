"""Expert models that make labels, on the pod that trains with them."""
