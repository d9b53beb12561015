"""Objects -> dataset: `write_plan` and `plan_shards`, `samples`, `pack` (on Ray), `folder`, `finalize` and `card`, `verify`."""
