"""Steps whose gradient was not finite: they change nothing, are counted, and beyond a limit end the run."""

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pbe_train.config import TrainSettings
from pbe_train.data.training_dataset import Batches
from pbe_train.training.measures import Reading
from pbe_train.training.ranks import Ranks

MOST_SHOWN = 8


class SkippedSteps:
    """The book of a run's skipped steps since it was started; the same on all ranks, as the gradient is."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._places: list[int] = []

    def add(self, reading: Reading) -> None:
        """Note those of a reading."""
        if skipped := reading.skipped():
            self.steps += skipped
            self._places = reading.offending()

    def check(self, settings: TrainSettings, batches: Batches, ranks: Ranks) -> None:
        """Stop a run in which there are too many. All ranks must call.

        Raises:
            InputError: names the samples of the newest such step: those whose loss was not finite, or all, if each was.
        """
        if len(self.steps) <= settings.most_skipped:
            return
        first, last = self.steps[0], self.steps[-1]
        keys, slots = batches.items.keys(last), [slot for part in batches.sampler.slots for slot in part]
        offending = [key for some in ranks.gather([keys[slots[place]] for place in self._places]) for key in some]
        what = "whose samples with infinite losses were" if offending else "whose losses were finite and whose samples were"
        named = offending or keys
        shown = ", ".join(named[:MOST_SHOWN]) + (f" and {len(named) - MOST_SHOWN} more" if len(named) > MOST_SHOWN else "")
        raise InputError(
            f"{settings.out}: gradients were infinite or not a number in {number_of(len(self.steps), 'step')}, "
            f"more than most_skipped {settings.most_skipped}: from step {first + 1} to step {last + 1}, {what} {shown}; "
            "these steps changed nothing: look at the samples, or start a new run with a lower --optimizer.learning_rate"
        )
