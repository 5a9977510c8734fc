"""Implementations of search and statistics: plain operators in blocks, and Triton kernels."""
