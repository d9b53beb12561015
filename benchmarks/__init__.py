"""Programs that measure and print a table; results in `benchmarks/results/*.json`. Never asserted in tests."""
