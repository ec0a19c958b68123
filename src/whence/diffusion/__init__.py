"""Mathematics of diffusion: tensors in, tensors out. No paths, no settings, no loops over data."""
