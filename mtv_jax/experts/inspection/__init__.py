"""What to look at in label sets before training on them."""
