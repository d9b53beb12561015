"""Crawling: photos of accepted objects -> a photo store, with an outcome for each photo."""
