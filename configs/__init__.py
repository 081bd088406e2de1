"""Training recipes, installed as `mtv_jax.configs`."""
