#!/usr/bin/env bash
# EPBT on a folder of images with a subfolder for each class, then one new network by the evolved schedule.
#   examples/image_folder.sh                  on 500 digits of scikit-learn, which it writes as PNG files
#   examples/image_folder.sh PICTURES OUT     on your own; the runs go to OUT and OUT-replay
# A copy elsewhere finds the repository by EPBT=/path/to/it.
set -euo pipefail
root=${EPBT:-$(dirname "$0")/..}
pictures=${1:-data/digit-pictures}
out=${2:-runs/pictures} out=${out%/}

if [ $# = 0 ] && [ ! -e "$pictures" ]; then python - "$pictures" << 'PYTHON'
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
for i, (image, label) in enumerate(zip(digits.images[:500] * 15, digits.target)):
    folder = Path(sys.argv[1], f"digit {label}")
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype("uint8")).save(folder / f"{i:03}.png")
PYTHON
fi

# Small batches and small steps, as so large a network else learns nothing from so few images.
python "$root/epbt.py" --dataset "$pictures" --image-size 16 --model torchvision:resnet18 --out "$out" --overwrite \
    --preset best --population 3 --generations 3 --epochs 2 --batch-size 16 --learning-rate 0.002
python "$root/epbt.py" --dataset "$pictures" --image-size 16 --replay "$out" --out "$out-replay" --overwrite \
    --generations 6 --threads 1
python "$root/figures.py" "$out" "$out-replay" --out "$out/compared"
