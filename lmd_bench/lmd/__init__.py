"""LMD, latent masking diffusion (Ma et al. 2023, arXiv 2312.07971): the subject of the benchmark."""
