"""Objects -> dataset: `write_plan`, `samples`, `encode`, `pack` (on Ray), `records`, `finalize`, `upload`, `verify_dataset`."""
