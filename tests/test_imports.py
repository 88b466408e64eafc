import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_nothing_beyond_torch_and_lightning():
    """lightning itself may load transformers and matplotlib, through torchmetrics; the package must add none."""
    heavy = "{'transformers', 'timm', 'datasets', 'matplotlib', 'peft', 'sklearn', 'torchvision'}"
    assert run(
        "import sys, lightning.pytorch; before = set(sys.modules);"
        f"import lalora_lightning; print({heavy} & (set(sys.modules) - before) or 'none')"
    ) == ("none")


def test_the_core_knows_no_lightning():
    """`functional` knows no layers; layers, adapters and allocator know no Lightning."""
    loaded = (
        "import importlib.util, sys, types;"
        "package = types.ModuleType('lalora_lightning');"
        "package.__path__ = importlib.util.find_spec('lalora_lightning').submodule_search_locations;"
        "sys.modules['lalora_lightning'] = package;"
    )
    assert run(loaded + "import lalora_lightning.allocator; print('lightning' in sys.modules)") == "False"
    assert (
        run(loaded + "import lalora_lightning.functional; print('lalora_lightning.layers' in sys.modules)") == "False"
    )


def test_names_are_loaded_when_they_are_used():
    """The package itself loads nothing; adapters and allocator load no Lightning; the reader of logs loads no torch."""
    seen = "print(*(name in sys.modules for name in ('torch', 'lightning')))"
    assert run(f"import sys, lalora_lightning; {seen}") == "False False"
    assert (
        run(f"import sys; from lalora_lightning import RankAllocator, add_lora, lora_state_dict; {seen}")
        == "True False"
    )
    assert run(f"import sys; from lalora_lightning import LaLoraCallback; {seen}") == "True True"
    assert run(f"import sys; import lalora_lightning.names, lalora_lightning.log_keys; {seen}") == "False False"


def test_all_public_names_can_be_loaded_and_no_other():
    assert run("import lalora_lightning as l; print(all(getattr(l, n) is not None for n in l.__all__))") == "True"
    assert (
        run("import lalora_lightning as l; print(hasattr(l, 'nothing'), set(l.__all__) <= set(dir(l)))") == "False True"
    )


def test_modules_are_attributes_of_the_package():
    modules = "functional initialization layers adapters sparsity allocator saving callback"
    code = f"import lalora_lightning as l; print(*(getattr(l, n).__name__ for n in '{modules}'.split()))"
    assert run(code) == " ".join(f"lalora_lightning.{name}" for name in modules.split())
