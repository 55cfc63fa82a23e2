"""Evaluation: what the concept head reads, what the model answers, what it refuses without need. Knows no data set."""
