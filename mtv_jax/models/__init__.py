"""Image and text towers, and heads."""
