"""Views: plans, operations, kernels."""
