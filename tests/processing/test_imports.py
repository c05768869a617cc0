import subprocess
import sys


def test_processing_is_imported_without_torch_and_transformers() -> None:
    code = (
        "import sys, opsin.inputs, opsin.outputs, opsin.multimodal, opsin.processing.output;"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"
