"""From files to batches on the host: nothing here imports JAX."""
