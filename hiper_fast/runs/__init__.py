"""What a run keeps in its folder: options, metrics, checkpoints, episodes and the report."""
