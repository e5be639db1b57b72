"""Where `dino-train` and `python -m dino_train` start."""

import os

# Data workers share the cores with training on a CPU: threads that spin while they wait starve them (measured on the
# demo, 2 cores: 305 images/s spinning, 428 passive). OpenMP reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dino_train.cli import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
