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
