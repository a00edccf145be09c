"""Measurements of fastattn against PyTorch: benchmarks by operation, and the main job on real text."""
