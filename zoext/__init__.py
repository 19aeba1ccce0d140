"""Forward-only (zeroth-order) fine-tuning for PyTorch."""
