"""Training: options and horizon, a run and its folder, the trainer, its callbacks, and checkpoints."""
