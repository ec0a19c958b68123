"""Scores that take no gradients: what any method has to beat."""

from dataclasses import replace

from whence.methods.frame import Baseline

PIXELS = Baseline(name="pixels", kind="pixels", source="cosine of the pixels in [-1, 1]")
"""Cosine of raw pixels."""

PIXELS_DOT = replace(PIXELS, name="pixels-dot", product="dot", source="inner product of the pixels in [-1, 1]")
"""Inner product of raw pixels."""

VAE = Baseline(name="vae", kind="vae", source="raw similarity of Zheng et al. 2024, arXiv:2311.00500")
"""Cosine of the latents of a VAE: the mode of its posterior, scaled as a latent diffusion model sees it."""

VAE_DOT = replace(VAE, name="vae-dot", product="dot")
"""Inner product of the latents of a VAE."""

CLIP = Baseline(name="clip", kind="clip", source="CLIP similarity of Zheng et al. 2024, arXiv:2311.00500")
"""Cosine of the image features of a CLIP model (Radford et al. 2021, arXiv:2103.00020)."""

CLIP_DOT = replace(CLIP, name="clip-dot", product="dot")
"""Inner product of the image features of a CLIP model."""

EMBEDDINGS = Baseline(name="embeddings", kind="embeddings", source="cosine of features of an encoder of your own")
"""Cosine of the features of any encoder."""

EMBEDDINGS_DOT = replace(
    EMBEDDINGS, name="embeddings-dot", product="dot", source="inner product of features of an encoder of your own"
)
"""Inner product of the features of any encoder."""

RANDOM = Baseline(name="random", kind="random", source="independent normal scores")
"""No information at all."""
