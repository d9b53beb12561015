"""Annotation readers: a source's own files -> record batches of boxes (schema `schemas.tables.BOXES`)."""
