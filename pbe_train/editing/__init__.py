"""A trained model at work: photos of any size, regions of them, references."""
