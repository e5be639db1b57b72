"""tyro, or a stub if it is not installed. Only the command line needs it, but annotations of options use its names."""

from typing import Any

__all__ = ["tyro"]


class _Absent:
    """Every attribute and call returns the stub itself; as an annotation of an option it has no effect."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
        return self


tyro: Any
try:
    import tyro
    import tyro.constructors
except ImportError:
    tyro = _Absent()
