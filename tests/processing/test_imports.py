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


def test_tokenizer_is_opened_without_the_modelling_code_of_transformers() -> None:
    code = (
        "import sys, opsin.demo; from pathlib import Path; from opsin.processing.tokenizer import Tokenizer;"
        "Tokenizer.from_folder(Path(opsin.demo.__file__).parent / 'model');"
        "print(sorted({'torch._dynamo', 'torch.distributed.tensor', 'transformers.modeling_utils'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"
