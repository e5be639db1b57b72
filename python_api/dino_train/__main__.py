"""Where `dino-train` and `python -m dino_train` start."""

import sys

from dino_train.common.process import tune

__all__ = ["main"]


def main() -> int:
    tune()
    try:
        from dino_train.cli import main as command
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("dino_kernels", "dino_train"):
            raise
        install = 'pip install "dino-kernels[train]", in a clone pip install ".[train]"'
        print(f"dino-train: error: needs {package}, which is not installed: {install}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dino-train: interrupted", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    raise SystemExit(main())
