"""`pbe COMMAND [options]`: the same as `python -m MODULE [options]`, with one place for --help.

A command's module is imported when it is asked for, so that `pbe --help` loads nothing. Each module runs as the program it is,
so that what it prints, what it returns and what its --help says are the same, however it was started.
"""

import difflib
import runpy
import sys

from pbe_core.errors import InputError, run_program

COMMANDS = {
    "plan": ("pipelines.plan", "what a build would make and cost, from the annotation tables alone"),
    "crawl": ("pipelines.crawl", "fetch the photos of accepted objects into a photo store"),
    "build": ("pipelines.build", "boxes and photos to shards"),
    "buckets": ("pipelines.buckets", "print shapes for views that are not square (views.buckets)"),
    "survey": ("pipelines.survey", "find photos that are there under two ids"),
    "verify": ("pipelines.verify", "read a dataset from end to end: is it whole?"),
    "inspect": ("pipelines.inspect_dataset", "look at a dataset: report, preview (contact sheet), trace (one sample), masks"),
    "benchmark": ("pipelines.benchmark", "boxes and photos to pairs of photo, mask and reference, for judging models by"),
    "cost": ("pbe_train.cost", "what a training will take: memory by batch, hours by GPU"),
    "train": ("pbe_train.train", "shards to model; on several GPUs: torchrun --nproc-per-node 8 -m pbe_train.train"),
    "evaluate": ("pbe_train.evaluate", "how good is a model? scores with intervals, between rows that bound them"),
    "ablations": ("pbe_train.ablations", "the paper's table of ablations over any preset: arms, seeds, intervals"),
    "edit": ("pbe_train.sample", "paint what a reference shows into a region of a photo"),
    "app": ("pbe_train.app.__main__", "edit photos, and look into datasets, in a browser"),
    "export": ("pbe_train.export", "write a run as diffusers or the original code load it"),
    "demo": ("pbe_cli.demo", "the tiny world from photos to a picture, in the current folder"),
}


def main() -> None:
    """Run the command that the first argument names."""
    run_program(run_command)


def run_command() -> int:
    """Run a module as `python -m` does; returns the status of the list of commands, since a program ends the process itself."""
    name, rest = sys.argv[1] if sys.argv[1:] else "", sys.argv[2:]
    if name in ("", "-h", "--help"):
        print(usage())
        return 0 if name else 2
    if name not in COMMANDS:
        near = "".join(f" (did you mean `{word}`?)" for word in difflib.get_close_matches(name, COMMANDS, 1))
        raise InputError(f"no command `{name}`{near}; commands: {', '.join(COMMANDS)}")
    # argparse names the program by the first word.
    sys.argv = [f"pbe {name}", *rest]
    runpy.run_module(COMMANDS[name][0], run_name="__main__")
    return 0


def usage() -> str:
    """One line for each command."""
    lines = (f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items())
    what = "Boxes and photos to shards, shards to a model, a model to edits."
    more = "pbe COMMAND --help explains a command and its options."
    return "\n".join(["usage: pbe COMMAND [options]", "", what, "", *lines, "", more])


if __name__ == "__main__":
    main()
