"""The sandbox: a small drawn world and a small base VLM in which every claim of the method can be seen on a CPU."""
