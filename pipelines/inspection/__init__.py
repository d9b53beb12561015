"""A dataset for people to look at: all `figures` of its tables, `charts` of them, one page (`report`), pictures of samples."""
