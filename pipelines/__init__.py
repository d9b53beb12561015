"""Boxes -> shards, on Ray. One file a stage, in the order data flows: annotations, selection, plan, pack, seal."""

import os

# Nothing phones home. Set before Ray is imported anywhere, and inherited by its workers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Only with this do workers inherit a CPU-only driver's view of the machine; Ray warns about it otherwise.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
