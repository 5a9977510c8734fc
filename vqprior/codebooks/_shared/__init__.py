"""What rules share: statistics, draws, and the choice of kernels."""
