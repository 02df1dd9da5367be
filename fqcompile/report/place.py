"""Where a weight sits in its model, read from its parameter name: which layer, in what role."""

from dataclasses import dataclass

SUFFIX = ".weight"


@dataclass(frozen=True)
class Place:
    """`model.layers.3.mlp.up_proj.weight` is layer 3 of `model.layers`, its tail the rest.

    The number of an expert is a `*` in the tail, so that all experts of a layer share one role.
    Outside any layer, `stack` is empty, `layer` None and `tail` the whole name.
    """

    stack: str
    layer: int | None
    tail: str

    @property
    def role(self) -> str:
        """The tail as people say it: without `.weight`."""
        return "+".join(part.removesuffix(SUFFIX) or part for part in self.tail.split("+"))

    @property
    def layer_query(self) -> str:
        """What to filter names by to see this layer; `^` stands for the beginning of a name."""
        return f"^{self.stack}.{self.layer}." if self.stack else f"^{self.layer}."

    @property
    def role_query(self) -> str:
        """What to filter names by to see this role in every layer: words that all occur."""
        if self.layer is None:
            return f"^{self.tail}"
        return f".{self.tail}".replace("*", " ").replace("+", " ")


def place_of(name: str) -> Place:
    """The place of a parameter, or of several joined by `+`, which is where the first one is."""
    stack, layer, first = _split(name.partition("+")[0])
    others = [_split(other) for other in name.split("+")[1:]]
    if layer is None or any(other[:2] != (stack, layer) for other in others):
        return Place(stack, layer, "+".join([first, *name.split("+")[1:]]))
    return Place(stack, layer, "+".join([first, *(tail for _, _, tail in others)]))


def _split(name: str) -> tuple[str, int | None, str]:
    """What precedes the first number of a name, the number, and what follows it."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        tail = ".".join(_same_expert(parts[at + 1 :]))
        if part.isascii() and part.isdecimal() and tail.strip("."):
            return ".".join(parts[:at]), int(part), tail
    return "", None, name


def _same_expert(parts: list[str]) -> list[str]:
    before = ["", *parts]
    return [
        "*" if part.isdecimal() and previous == "experts" else part
        for previous, part in zip(before, parts, strict=False)
    ]
