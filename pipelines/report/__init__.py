"""The report of a dataset folder: its tables counted (`counting`), all figures (`figures`), `charts` of them, and one `page`."""
