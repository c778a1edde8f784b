"""cuDNN through PyTorch's own fused operators."""
