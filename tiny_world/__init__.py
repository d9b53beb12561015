"""A small painted world, written like Open Images, with the small weights that were trained on it."""
