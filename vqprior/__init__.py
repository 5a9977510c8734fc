"""Composable building blocks for vector-quantized priors."""
