"""The student of edgekd.toml: a convolutional text classifier on MiniLM's word embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

TEACHER_WEIGHTS = Path(__file__).parent / "teacher" / "model.safetensors"
WORDS = 30_522


class Student(nn.Module):
    """Embeddings, two convolutions over the tokens, the mean and the largest value of each channel, a linear layer.

    Args:
        width: Of an embedding.
        channels: Of a convolution.
    """

    def __init__(self, width: int = 96, channels: int = 128) -> None:
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
        self.classifier = nn.Linear(2 * channels, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(1).float()
        words = self.dropout(self.embedding(input_ids)).transpose(1, 2) * mask
        features = self.convolutions(words) * mask
        mean = features.sum(2) / mask.sum(2).clamp(min=1)
        largest = features.amax(2)  # features are 0 or more, so the zeros of the padding never win
        return self.classifier(self.dropout(torch.cat([mean, largest], dim=1)))


def student() -> nn.Module:
    """A student whose embeddings are the principal components of MiniLM's (as in model2vec), scaled to unit variance.

    MiniLM's embeddings were frozen while it was fine-tuned: the control starts from them too and still sees nothing
    of what the teacher learned about spam.
    """
    model = Student()
    model.embedding.weight.data.copy_(principal_components(model.embedding.embedding_dim))
    return model


def principal_components(width: int) -> Tensor:
    """MiniLM's word embeddings in the directions of their largest variance; (words, width).

    Raises:
        FileNotFoundError: ``train_teacher.py`` was not run yet.
    """
    from safetensors import safe_open

    if not TEACHER_WEIGHTS.is_file():
        raise FileNotFoundError(
            f"no {TEACHER_WEIGHTS}; python train_teacher.py makes it (about 30 minutes on one core)"
        )
    with safe_open(TEACHER_WEIGHTS, "pt") as file:
        table = file.get_tensor("bert.embeddings.word_embeddings.weight").double()
    table = table - table.mean(0)
    directions = torch.linalg.eigh(table.T @ table).eigenvectors.flip(1)[:, :width]
    components = table @ directions
    return (components / components.std()).float()
