"""Which low-rank layers are switched off in the current thread, see :func:`lalora_lightning.disable_adapters`."""

import itertools
import threading

__all__ = ["change_switch", "is_switched_off", "new_switch"]

# An attribute for each layer that is switched off: how often. There is none while it is on. torch.compile guards such
# attributes, so it compiles one graph for each state and does not recompile.
_switched_off = threading.local()
_numbers = itertools.count()


def new_switch() -> str:
    """Return the name of a new switch, which is on."""
    return f"layer_{next(_numbers)}"


def change_switch(switch: str, change: int) -> None:
    """Switch off once more (1) or once less (-1) in this thread."""
    times = getattr(_switched_off, switch, 0) + change
    if times:
        setattr(_switched_off, switch, times)
    else:
        delattr(_switched_off, switch)


def is_switched_off(switch: str) -> bool:
    """Return whether a switch is off in this thread."""
    return hasattr(_switched_off, switch)
