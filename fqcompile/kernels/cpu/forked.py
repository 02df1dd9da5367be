"""Whether this process is a forked child, in which threads of the parent's pool do not exist."""

import os

_state = {"forked": False}


def in_forked_child() -> bool:
    """True in a child of os.fork: libgomp would wait there for the parent's threads forever."""
    return _state["forked"]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _state.update(forked=True))
