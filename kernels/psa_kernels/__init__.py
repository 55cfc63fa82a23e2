"""Triton kernels and thin launchers: tensors in, tensors out; no autograd. Imports torch and triton only."""
