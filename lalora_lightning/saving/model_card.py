"""The model card of an adapter: its base model, its ranks, its scores."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lalora_lightning.tables import markdown_table

__all__ = ["is_model_card", "model_card"]


def model_card(
    ranks: Mapping[str, int], trained: Sequence[str], config: Mapping[str, Any], facts: Mapping[str, Any]
) -> str:
    """Return a README in the Hub's form, which begins with metadata.

    Args:
        ranks: Rank of each adapted projection.
        trained: Names of the modules that were trained in full.
        config: The adapter's ``adapter_config.json``.
        facts: Further rows of the card, such as scores, settings of the run and data.
    """
    base = config["base_model_name_or_path"]
    if base is not None and (Path(base).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)):
        # The Hub rejects a card that names a local folder.
        base = None
    metadata = {"base_model": base, "library_name": "peft", "tags": ["lora", "la-lora", "lalora-lightning"]}
    # Every JSON value is also valid YAML.
    front = [f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value is not None]
    settings = {
        "base model": base or "not known",
        "ranks": f"{sum(ranks.values())} in {len(ranks)} projections, {min(ranks.values())} to {max(ranks.values())}",
        "form": "mixed: each projection has its rank" if config["rank_pattern"] else f"padded to rank {config['r']}",
        "trained in full": ", ".join(trained) or "nothing",
        **facts,
    }
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            "# Low-rank adapter with adaptive ranks",
            "",
            "Trained by La-LoRA (Gu et al., Neural Networks 194, 2025, 108095) with lalora-lightning. PEFT loads it:",
            "",
            "```python",
            'model = PeftModel.from_pretrained(base_model, "THIS FOLDER OR REPOSITORY")',
            "```",
            "",
            _table(["", ""], settings),
            "",
            "## Ranks",
            "",
            _table(["projection", "rank"], ranks),
            "",
        ]
    )


def is_model_card(text: str) -> bool:
    """Return whether a README is a card that :func:`model_card` wrote."""
    return text.startswith("---") and "lalora-lightning" in text.partition("\n---\n")[0]


def _table(header: list[str], rows: Mapping[str, Any]) -> str:
    return markdown_table(header, [[name, str(value)] for name, value in rows.items()])
