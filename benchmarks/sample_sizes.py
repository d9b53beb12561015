"""How many bytes the parts of a sample take on real photos: what `pipelines/plan.py` estimates a dataset's size from.

    python -m benchmarks.sample_sizes DATASET [DATASET ...]

Writes pipelines/dataset/rates/sample_sizes.json: means over all samples of the datasets, and how many they are. Arrays are not in
it: their size is known.
"""

import argparse
import datetime
import json
from pathlib import Path

import pyarrow.parquet as pq

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import run_program
from pbe_core.files import write_atomically
from pbe_core.images.decode import decode_photo
from pipelines.dataset.estimate import RATES
from schemas.sample import MEMBER_NAMES

OUT = RATES / "sample_sizes.json"


def measure(datasets: list[Path]) -> dict[str, float]:
    """Sums over all samples, divided by what each part grows with."""
    total = dict.fromkeys(
        ("samples", "json", "polygons", "masks", "mask", "sides", "reference", "reference_pixels", "view", "view_pixels"), 0
    )
    for dataset in datasets:
        info = read_dataset(dataset)
        for row in pq.read_table(dataset / "index.parquet").to_pylist():
            members = {}
            with (dataset / "shards" / f"{row['shard']}.tar").open("rb") as file:
                for name in MEMBER_NAMES:
                    place = row[name.replace(".", "_")]
                    if place:
                        file.seek(place["offset"])
                        members[name] = file.read(place["length"])
            record = json.loads(members["json"])
            polygons = len(json.dumps(record["mask_polygons"], separators=(",", ":"))) + len(json.dumps(record["mask_kinds"]))
            height, width = decode_photo(members["ref.jpg"], frame="stored").shape[:2]
            total["samples"] += 1
            total["json"] += len(members["json"]) - polygons
            total["polygons"] += polygons
            total["masks"] += len(record["mask_kinds"])
            total["mask"] += len(members["mask.json"])
            total["sides"] += len(record["mask_kinds"]) * info.view_size
            total["reference"] += len(members["ref.jpg"])
            total["reference_pixels"] += height * width
            if "view.jpg" in members:
                total["view"] += len(members["view.jpg"])
                total["view_pixels"] += info.view_size**2
    return {
        "samples": total["samples"],
        "json_bytes": total["json"] / total["samples"],
        "json_bytes_per_mask": total["polygons"] / total["masks"],
        "mask_bytes_per_view_side": total["mask"] / total["sides"],
        "reference_bytes_per_pixel": total["reference"] / total["reference_pixels"],
        "view_bytes_per_pixel": total["view"] / max(1, total["view_pixels"]),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("datasets", type=Path, nargs="+", help="folders of datasets with kept views")
    result = measure(parser.parse_args().datasets)
    OUT.parent.mkdir(exist_ok=True)
    write_atomically(OUT, json.dumps({"date": datetime.date.today().isoformat(), **result}, indent=1).encode())
    for name, value in result.items():
        print(f"{name:>28} {value:,.3f}")


if __name__ == "__main__":
    run_program(main)
