"""The native library's CUDA part, called from Python."""
