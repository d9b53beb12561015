"""The ladder of ablations: arms, their trainings, one evaluation of all, and what the differences say."""
