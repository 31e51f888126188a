"""Tiny-ImageNet as an image folder, which train.py and eval.py read.

    python extras/tinyimagenet.py                      # downloads 237 MB into data/, once
    python train.py --dataset data/tiny-imagenet-200   # 200 classes, images become 32x32

The official archive has its 10,000 test images in one flat folder, beside a table that names the
class of each. This script moves them into class folders, as those of the training images are.
"""

import sys
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def sort_by_class(val):
    """Move val/images/NAME to val/CLASS/NAME, as val/val_annotations.txt has it."""
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, class_name = line.split("\t")[:2]
        source = val / "images" / name
        if source.exists():
            (val / class_name).mkdir(exist_ok=True)
            source.rename(val / class_name / name)
    if (val / "images").is_dir():
        (val / "images").rmdir()


def main(root="data"):
    """Download the archive into `root`, unless it lies there, and sort its test images."""
    val = Path(root) / "tiny-imagenet-200" / "val"
    try:
        if not (val / "val_annotations.txt").is_file():
            download_and_extract_archive(URL, root, md5=MD5)
        sort_by_class(val)
    except (OSError, RuntimeError) as error:
        print(f"Tiny-ImageNet cannot be made in {root}/: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
