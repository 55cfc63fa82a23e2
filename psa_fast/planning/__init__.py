"""What a run needs in memory, from the model's configuration alone."""
