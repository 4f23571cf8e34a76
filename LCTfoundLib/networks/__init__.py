"""Networks: diffusion backbone presets, 3D segmentation nets, adapter heads."""
