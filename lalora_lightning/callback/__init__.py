"""LaLoraCallback and what it needs to know of Lightning."""

from lalora_lightning.callback.callback import LaLoraCallback

__all__ = ["LaLoraCallback"]
