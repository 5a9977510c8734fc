"""What only quantizers share: checked inputs, results, columns of indices, wrappers."""
