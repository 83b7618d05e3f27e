"""Training: state, step, loop, optimizer, checkpoints."""
