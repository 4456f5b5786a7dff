"""`python -m utils.report`: versions, device and data counts for a bug report, without paths."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from utils.common import ROOT, Parser, command, git_commit

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pycocotools", "ftfy", "regex", "matplotlib")
DATA_FILES = ("refs(unc).p", "refs(umd).p", "refs(google).p", "grefs(unc).json", "instances.json")


def version_of(package) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> str:
    """The processor's kind and cores, and the accelerators that torch sees."""
    found = [f"{os.cpu_count()} cores, {platform.machine()}"]
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        found.append(f"{torch.cuda.get_device_name(i)}, {memory:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return "; ".join(found)


def data_counts(data) -> list[str]:
    """The sizes of the annotation files, and how many images there are."""
    files = [path for name in DATA_FILES for path in sorted(Path(data).glob(f"*/{name}"))]
    lines = [f"{path.parent.name}/{path.name}: {path.stat().st_size:,} bytes" for path in files]
    images = sum(1 for _ in Path(data, "images", "train2014").glob("*.jpg"))
    return [*lines, f"images/train2014: {images:,} images"]


@command
def main(argv=None):
    parser = Parser(description="Print what a bug report needs. It holds no paths and no names.")
    parser.add_argument("--data", default="data", metavar="DIR", help="prepare.py's folder (data)")
    args = parser.parse_args(argv)

    print(f"commit {git_commit()}")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.release()}")
    print(", ".join(f"{package} {version_of(package)}" for package in PACKAGES))
    print(devices())
    print("shipped weights:", ", ".join(sorted(path.name for path in ROOT.glob("weights/*.pt"))))
    print("data:", "; ".join(data_counts(args.data)))


if __name__ == "__main__":
    main()
