"""Training and evaluation: trainer, step, hooks, processes, checkpoints, ZeRO."""
