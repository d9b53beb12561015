"""Boxes -> objects + rejects: the rules, and the stage that applies them to more boxes than memory holds."""
