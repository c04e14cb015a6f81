"""Replaces jaxtyping on a machine that lacks it: annotations have no meaning, and shapes are not checked."""


class _Anything:
    def __class_getitem__(cls, item: object) -> type:
        return cls


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything
