"""Curvature: what stands between two gradients in an influence function. Tensors in, tensors out."""
