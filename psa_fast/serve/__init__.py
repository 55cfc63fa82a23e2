"""The guard behind HTTP: the formats of other people's clients, one worker that batches, and offline scoring."""
