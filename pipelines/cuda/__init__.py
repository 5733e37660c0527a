"""Launching CUDA kernels, and what their compilation says."""
