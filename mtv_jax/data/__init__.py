"""Host data pipeline: sources, labels, ops, batches; imports no JAX."""
