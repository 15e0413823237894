"""Printers: the same schedule as Triton, as C++ and as composed PyTorch, and the eager meaning they are all held to."""
