"""Errors of the package, translated to the options of a recipe."""

import pytest

from lalora_lightning.data.glue import GlueDataModule
from lalora_lightning.modules.sequence_classification import SequenceClassificationModule
from recipes.cli import argument_options, options_in

OPTIONS = argument_options(
    SequenceClassificationModule,
    GlueDataModule,
    [("data.num_labels", "model.num_labels", "instantiate"), ("model.name", "data.tokenizer", "parse")],
)


def test_arguments_have_the_options_of_their_class_or_link():
    assert OPTIONS["path"] == ["--data.path"]
    assert OPTIONS["name"] == ["--model.name"]
    assert OPTIONS["rank"] == ["--lalora.rank"]
    # The tokenizer follows the model's name, and the number of labels is the data's and no option.
    assert OPTIONS["tokenizer"] == ["--model.name"]
    assert "num_labels" not in OPTIONS


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("Cannot load the data set 'x' (no such name (or path)). Without a network, set path to a folder in the "
         "Hub's layout.", ["--data.path"]),
        ("Cannot load 'path' by AutoTokenizer (offline). Set name to a local model folder.", ["--model.name"]),
        ("Expected max_length to be above 2 but got 1; raise max_length or change name.",
         ["--data.max_length", "--model.name"]),
        ("Expected `path` to exist.", ["--data.path"]),
        ("Cannot adapt a.query. Expected rank to be in [1, 8] but got 9.", ["--lalora.rank"]),
        ("Expected /data/path and model.name and <task>.parquet and --data.path to be ignored.", []),
    ],
)  # fmt: skip
def test_arguments_named_in_a_message(message: str, options: list[str]):
    assert options_in(message, OPTIONS) == options
