"""oneDNN through PyTorch's own fused operators."""
