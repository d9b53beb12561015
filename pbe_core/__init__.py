"""What both wings use: errors, files, storage, settings, random numbers by name, images, the VAE."""
