"""What makes it fast: Triton, the compiled CPU path, PyTorch's int4 kernel."""
