"""What both wings use: errors, files, storage, settings, random numbers by name, images, the VAE."""

from pbe_core.errors import end_on_interrupt

end_on_interrupt()
