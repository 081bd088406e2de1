"""The towers and what they are made of."""
