"""A billion photos, on paper: a model of crawl and pack, its constants, its check against runs, and where today's design ends."""
