"""LaLoraCallback, and the code that depends on details of Lightning."""

from lalora_lightning.callback.callback import LaLoraCallback

__all__ = ["LaLoraCallback"]
