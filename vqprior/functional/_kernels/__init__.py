"""What computes the search and the statistics: blocks of plain operators, and Triton kernels."""
