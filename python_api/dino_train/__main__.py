"""Where `dino-train` and `python -m dino_train` start."""

from dino_train.common.process import tune

tune()

from dino_train.cli import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
