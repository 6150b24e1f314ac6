"""Triton kernels, one file an operator; installed as `aufast.kernels`."""
