"""Says how many programs torch.compile is given for two edits; run apart, since the checks of shapes in tests break them."""

from functools import cache

import torch

from pbe_train.model import guided
from pbe_train.model.diffusion import paint_latents
from tests.pbe_train.test_model import make_model

if __name__ == "__main__":
    torch.set_num_threads(1)
    graphs = []

    def count(graph, _):
        """A backend that compiles nothing."""
        graphs.append(graph)
        return graph.forward

    guided._compiled = cache(lambda one: torch.compile(one, dynamic=False, fullgraph=True, backend=count))
    model = make_model().eval()
    given = torch.randn(2, 1, 4, 8, 8), torch.ones(1, 1, 8, 8), torch.randn(2, 1, 1, 24)
    how = {"seeds": [0], "guidance": 3.0, "steps": 6, "scheduler": "DDIMScheduler", "prediction": "epsilon", "reuse": 2}

    def paint(number):
        """One of two edits; every second of its steps is whole."""
        with torch.no_grad():
            return paint_latents(model, given[0][number], given[1], given[2][number], **how)

    expected = [paint(number) for number in range(2)]
    model.compiled_edits = True
    apart = max((paint(number) - expected[number]).abs().max().item() for number in range(2))
    print(len(graphs), apart)
