"""What the compiler has to say for itself: explain, draw, emit, inspect."""
