"""The U-Net with its conditioner, diffusion, schedulers, and the pipeline that paints with them."""
