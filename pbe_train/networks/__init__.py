"""The networks: published ones as a start, the conditioner, and the model made of them."""
