"""Boxes -> shards, on Ray. In the order data flows: `annotations/`, `selection/`, `crawling/`, `dataset/`, `inspection/`."""

import os

# Nothing phones home. Set before Ray is imported anywhere, and inherited by its workers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Which actors use a GPU is said in the settings, so Ray need not hide GPUs from the others (and warn that it will stop to).
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
