"""The two training stages on DeepSpeed: configuration, the loop, checkpoints, metrics."""
