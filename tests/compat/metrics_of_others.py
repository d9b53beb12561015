"""What other libraries make of two sets of features; runs in the environment of tests/compat/metrics.py, without this project.

    python -I metrics_of_others.py FEATURES.npz

Prints one line of JSON: library -> score -> value, or the first line of its error. The file has two arrays, `a` and `b`.
"""

import contextlib
import importlib.metadata
import json
import sys
import warnings

import numpy as np
import torch


def torch_fidelity(a, b):
    from torch_fidelity import metric_fid, metric_kid

    sets = torch.from_numpy(a), torch.from_numpy(b)
    statistics = [metric_fid.fid_features_to_statistics(one) for one in sets]
    yield "FID", lambda: metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]
    how = {"kid_subsets": 1, "kid_subset_size": len(a), "verbose": False}
    yield "KID", lambda: metric_kid.kid_features_to_metric(*sets, **how)[metric_kid.KEY_METRIC_KID_MEAN]


def torchmetrics(a, b):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Same(torch.nn.Module):
        """In place of Inception: features go in, features come out."""

        num_features = a.shape[1]

        def forward(self, features):
            return features

    def score(metric):
        metric.update(torch.from_numpy(a), real=True)
        metric.update(torch.from_numpy(b), real=False)
        return metric.compute()

    yield "FID", lambda: score(FrechetInceptionDistance(Same()))
    yield "KID", lambda: score(KernelInceptionDistance(Same(), subsets=1, subset_size=len(a)))[0]


def pytorch_fid(a, b):
    from pytorch_fid.fid_score import calculate_frechet_distance

    yield "FID", lambda: calculate_frechet_distance(*moments(a), *moments(b))


def clean_fid(a, b):
    from cleanfid import fid

    yield "FID", lambda: fid.frechet_distance(*moments(a), *moments(b))
    yield "KID", lambda: fid.kernel_distance(a, b, num_subsets=1, max_subset_size=len(a))


def moments(features):
    """As pytorch-fid and clean-fid take them of features."""
    return np.mean(features, axis=0), np.cov(features, rowvar=False)


def main():
    warnings.simplefilter("ignore")
    # torchvision's wheel is for a torch with CUDA. Beside one without it its operators do not load, and its import fails, since
    # it gives two of them implementations for shapes. Nothing here detects objects: it is enough that there are names.
    global library
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with np.load(sys.argv[1], allow_pickle=False) as file:
        a, b = file["a"], file["b"]
    answers = {}
    for name in ("torch-fidelity", "torchmetrics", "pytorch-fid", "clean-fid"):
        found = answers[f"{name} {importlib.metadata.version(name)}"] = {}
        with contextlib.redirect_stdout(sys.stderr):
            for score, compute in globals()[name.replace("-", "_")](a, b):
                try:
                    found[score] = float(compute())
                except Exception as error:
                    found[score] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
