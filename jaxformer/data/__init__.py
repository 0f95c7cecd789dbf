"""From text to numpy batches; nothing here imports jax when it is imported."""
