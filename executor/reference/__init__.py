"""Every kernel in plain NumPy: the readable form, which the fused kernels are tested against."""
