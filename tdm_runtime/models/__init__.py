"""One adapter a backbone family: what its denoiser is called with and where K enters."""
