#!/usr/bin/env bash
# diffusers 0.42.1: a scheduler's config that is changed as a dict and given back to from_config() makes a scheduler without the change.
#
# Guess: Kind.from_config({**scheduler.config, "beta_start": 0.00085}) has beta_start 0.00085.
# Behaviour: the config carries a list, _use_default_values, of the options that were left at their default. from_config() drops
# whatever is in that list, so that another kind of scheduler may take its own defaults, and drops with it a value that was put in
# later. Nothing is said. Given as from_config(scheduler.config, beta_start=0.00085) it is taken; so is a change of an option that
# had been chosen before.
# Why it matters: the schedule is what the noise was made by in training. Sampled on another one, pictures come out a little too
# grey or too noisy, and nothing points to the cause.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "torch==2.13.0" "numpy==2.4.6" "diffusers==0.42.1"
cat >probe.py <<'END'
import sys

import diffusers

plain = diffusers.DDIMScheduler()
chosen = diffusers.DDIMScheduler(beta_start=0.0002)
kind = diffusers.DDIMScheduler


def start(scheduler):
    return scheduler.config.beta_start


seen = {
    "left at its default, changed in the dict": start(kind.from_config({**plain.config, "beta_start": 0.00085})),
    "left at its default, given by keyword": start(kind.from_config(plain.config, beta_start=0.00085)),
    "chosen before, changed in the dict": start(kind.from_config({**chosen.config, "beta_start": 0.00085})),
}
recorded = dict(zip(seen, (0.0001, 0.00085, 0.00085)))
print("diffusers", diffusers.__version__)
print("beta_start of the new scheduler, 0.00085 wanted")
print("guess:", dict.fromkeys(seen, 0.00085))
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
