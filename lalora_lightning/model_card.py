"""The model card of an adapter: what it was trained on, its ranks, its scores."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def model_card(ranks: Mapping[str, int], config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """A README in the Hub's form, with metadata in front.

    Args:
        ranks: Rank of each adapted projection.
        config: The adapter's ``adapter_config.json``.
        facts: What else there is to say: scores, settings of the run, data.

    Returns:
        Markdown.
    """
    base = config["base_model_name_or_path"]
    if base is not None and (Path(base).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)):
        # The Hub refuses a card that names a folder of somebody's machine.
        base = None
    metadata = {"base_model": base, "library_name": "peft", "tags": ["lora", "la-lora", "lalora-lightning"]}
    # JSON is YAML.
    front = [f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value is not None]
    settings = {
        "base model": base or "not known",
        "ranks": f"{sum(ranks.values())} in {len(ranks)} projections, {min(ranks.values())} to {max(ranks.values())}",
        "trained in full": ", ".join(config["modules_to_save"] or ["nothing"]),
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
            *_table(["", ""], settings),
            "",
            "## Ranks",
            "",
            *_table(["projection", "rank"], ranks),
            "",
        ]
    )


def is_model_card(text: str) -> bool:
    """Whether a README is a card that :func:`model_card` wrote, and nobody's own."""
    return text.startswith("---") and "lalora-lightning" in text.partition("\n---\n")[0]


def _table(header: list[str], rows: Mapping[str, Any]) -> list[str]:
    cells = [header, ["---", "---"], *([name, str(value)] for name, value in rows.items())]
    return [f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in row)} |" for row in cells]
