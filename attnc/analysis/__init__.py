"""Proofs about a statement: normal forms per axis, inverses, block classes, counts. Nothing here knows a backend."""
