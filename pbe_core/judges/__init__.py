"""Judges: frozen networks, from files that the user names, whose features say how alike pictures are."""
