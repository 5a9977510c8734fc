"""Code shared by quantizers only: input checks, results, index columns, the wrapper."""
