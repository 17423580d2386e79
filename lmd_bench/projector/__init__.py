"""The latent space projector (LSP): frozen maps between images and the latents that methods are trained on.

`config` names and checks a projector without torch; `open` loads one; `train` makes a small one.
"""
