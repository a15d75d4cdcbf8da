"""What makes it fast and can be left out: Triton, the compiled CPU path, PyTorch's int4 kernel."""
