"""Pure geometry of rectangles, views, masks and references: no I/O, no global state, an explicit random generator."""
