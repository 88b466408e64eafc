"""Errors of the package, translated to the options of a recipe."""

from pathlib import Path

import pytest

from lalora_lightning.data.glue import GlueDataModule
from lalora_lightning.modules.sequence_classification import SequenceClassificationModule
from recipes.cli import argument_options, options_in, run

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
        ("Cannot load the data set 'x' (no such name). Without a network, set `path` to a folder.", ["--data.path"]),
        ("Expected `max_length` to be 2; change `max_length` or `name`.", ["--data.max_length", "--model.name"]),
        ("Cannot adapt a.query. Expected `rank` to be in [1, 8] but got 9.", ["--lalora.rank"]),
        ("Expected name, path and `nothing` to be known.", []),
    ],
)
def test_arguments_named_in_a_message(message: str, options: list[str]):
    assert options_in(message, OPTIONS) == options


def test_an_error_ends_a_recipe_with_the_options_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise FileNotFoundError("Cannot load the model; set `name` to a local folder.")

    monkeypatch.setattr("recipes.cli.RecipeCLI", fail)
    monkeypatch.setattr("sys.argv", ["glue"])
    monkeypatch.setattr("recipes.cli.quiet", lambda: None)
    with pytest.raises(SystemExit) as end:
        run(SequenceClassificationModule, GlueDataModule, "glue", variants=("data.task", "mrpc"))
    assert str(end.value).splitlines() == [
        "error: Cannot load the model; set `name` to a local folder.",
        "Options of this recipe: --model.name",
    ]
