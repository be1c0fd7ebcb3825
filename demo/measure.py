"""What quantization cost: how far the embeddings moved, and whether the order of the pairs survived."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Result", "cosines", "load_pairs", "pair_similarities", "rank_correlation", "same_tensors"]

PAIRS = Path(__file__).with_name("sentence_pairs.tsv")


@dataclass
class Result:
    """One row of the table, and the pair similarities that the plot shows."""

    name: str
    weight_bytes: int
    file_bytes: int
    mean_cosine: float
    worst_cosine: float
    rank_correlation: float
    grade_correlation: float
    sentences_per_second: float
    similarities: Tensor


def load_pairs() -> tuple[list[int], list[str]]:
    """Grades, and the sentences with the two of a pair side by side."""
    grades: list[int] = []
    sentences: list[str] = []
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            grade, first, second = line.split("\t")
            grades.append(int(grade))
            sentences += [first, second]
    return grades, sentences


def cosines(embeddings: Tensor, reference: Tensor) -> Tensor:
    """Cosine of each embedding to its reference; both are unit vectors."""
    return (embeddings.double() * reference.double()).sum(-1)


def pair_similarities(embeddings: Tensor) -> Tensor:
    """Cosine of the two sentences of each pair."""
    return cosines(embeddings[0::2], embeddings[1::2])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    values = values.double()
    below = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return below + (equal - 1) / 2


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's coefficient: the correlation of the ranks."""
    return float(torch.corrcoef(torch.stack([_ranks(first), _ranks(second)]))[0, 1])


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """The same keys, dtypes, shapes and bytes."""
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype
        and first[key].shape == second[key].shape
        and torch.equal(_bytes(first[key]), _bytes(second[key]))
        for key in first
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
