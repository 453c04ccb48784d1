"""Training: the loop, checkpoints, batches, and the fast paths of a training step."""
