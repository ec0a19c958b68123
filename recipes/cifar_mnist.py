"""The outlier experiment of the paper: 5,000 airplanes, 200 handwritten zeros among them.

    python recipes/cifar_mnist.py --data FOLDER --out cifar-mnist

FOLDER holds ``cifar_mnist.parquet`` (5,000 CIFAR-10 airplanes, then 200 MNIST zeros, 32 px) and
``cifar_mnist_queries.parquet`` (16 other airplanes, 16 other zeros), with columns id, image, label (airplane, mnist-0).
The recipe only writes down a command line: it runs ``whence train``, ``whence trace``, ``whence report`` and ``whence
check``, and prints each before it does.

Scaled to two CPU cores in about 17 minutes: 16 px instead of 32, a UNet of 1.1 instead of 133 million parameters, 30
epochs instead of 500. Kept from the paper: L1 loss, a learning rate of 1e-4, batches of 32, no augmentation, ten
checkpoints. What came out stands in docs/results/cifar_mnist.md.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

MODEL = "--resolution 16 --widths 32 64 64 --beta-schedule squaredcos_cap_v2"
TRAINING = "--epochs 30 --batch-size 32 --checkpoints 10 --learning-rate 1e-4 --schedule constant --loss l1"
TRACE = "--methods tracin retrac pixels random --timesteps 16 --draws 4"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the two parquet files")
    parser.add_argument("--out", type=Path, default=Path("cifar-mnist"), help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of training")
    arguments = parser.parse_args()
    run = shlex.quote(str(arguments.out))
    train = shlex.quote(str(arguments.data / "cifar_mnist.parquet"))
    queries = shlex.quote(str(arguments.data / "cifar_mnist_queries.parquet"))
    for command in [
        f"train {train} --out {run} {MODEL} {TRAINING} --seed {arguments.seed}",
        f"check {run}",
        f"trace {run} --queries {queries} {TRACE} --top 1",
        f"report {run} --planted mnist-0",
    ]:
        print(f"\n$ whence {command}", flush=True)
        subprocess.run([sys.executable, "-m", "whence", *shlex.split(command)], check=True)


if __name__ == "__main__":
    main()
