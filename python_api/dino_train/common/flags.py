"""tyro, or where it is not installed a stand-in: only the command line needs it, and options say how it reads them."""

from typing import Any

__all__ = ["tyro"]


class _Absent:
    """Whatever is asked of it or called is itself: as an annotation of an option it says nothing."""

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
