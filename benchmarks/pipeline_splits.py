"""How layers are split over virtual stages: as Megatron-Core splits them, and as a simple search finds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from benchmarks.pipeline_costs import Case


def megatron_split(layers: int, ranks: int, chunks: int = 1) -> list[int]:
    """Layers of each virtual stage: even, or with embedding and loss counted as a layer each, by Megatron's options.

    ``account_for_embedding_in_pipeline_split`` and ``account_for_loss_in_pipeline_split``.
    """
    stages = ranks * chunks
    for embedding, loss in ((0, 0), (1, 1), (0, 1), (1, 0)):
        if (layers + embedding + loss) % stages == 0:
            split = [(layers + embedding + loss) // stages] * stages
            split[0] -= embedding
            split[-1] -= loss
            return split
    raise ValueError(f"{layers} layers on {stages} virtual stages: expected a multiple, embedding and loss included")


def virtual_size(layers: int, ranks: int) -> int:
    """The fewest chunks above one that :func:`megatron_split` can make."""
    for chunks in range(2, layers + 1):
        try:
            megatron_split(layers, ranks, chunks)
        except ValueError:
            continue
        return chunks
    raise ValueError(f"{layers} layers on {ranks} ranks cannot be interleaved")


@lru_cache(maxsize=256)
def best_split(case: Case, variant: str) -> tuple[int, ...]:
    """The split of layers with the shortest step that a simple search finds; a better one may exist.

    It starts from Megatron's split and from splits that even out the ranks' loads, and from the best of them moves
    single layers while the simulated step gets shorter. A virtual stage may be left without layers, as Megatron's
    ``pipeline_model_parallel_layout`` allows.
    """
    megatron = tuple(megatron_split(case.model.layers, case.ranks, case.chunks))
    even = sorted(set(_even_splits(case, variant)), key=lambda split: (max(_loads(case, split, variant)), split))
    starts = sorted((case.seconds(split, variant), split) for split in {megatron, *even[:12]})
    chosen = {*starts[:3], (case.seconds(megatron, variant), megatron)}
    ends = []
    for best, split in sorted(chosen):
        while moves := [(case.seconds(other, variant), other) for other in _moves(case, split, variant)]:
            if min(moves)[0] > best - 1e-9:
                break
            best, split = min(moves)
        ends.append((best, split))
    return min(ends)[1]


def _moves(case: Case, split: tuple[int, ...], variant: str) -> Iterable[tuple[int, ...]]:
    """Splits one layer away that do not raise the largest load: off the two most loaded ranks, or any of few stages."""
    load = _loads(case, split, variant)
    few = len(split) <= 16
    heavy = sorted(range(case.ranks), key=lambda rank: -load[rank])[: case.ranks if few else 2]
    for source in (i for i, count in enumerate(split) if count and i % case.ranks in heavy):
        for rank in (rank for rank in range(case.ranks) if few or load[rank] < load[source % case.ranks] - 1e-12):
            # One target on each rank: its emptiest chunk, the nearest of these.
            target = min(range(rank, len(split), case.ranks), key=lambda i: (split[i], abs(i - source)))
            other = list(split)
            other[source] -= 1
            other[target] += 1
            if target != source and max(_loads(case, other, variant)) <= max(load) + 1e-12:
                yield tuple(other)


def _loads(case: Case, split: Sequence[int], variant: str) -> list[float]:
    """Computing seconds of each rank in one microbatch."""
    parts = case.parts(split, variant)
    both = [f + b for f, b in zip(parts["forward"], parts["backward"], strict=True)]
    return [sum(both[rank :: case.ranks]) for rank in range(case.ranks)]


def _even_splits(case: Case, variant: str) -> Iterable[tuple[int, ...]]:
    """Splits that give each next layer to the least loaded rank, for every place that the student can have."""
    stages, total = case.ranks * case.chunks, case.model.layers
    places = [(0, 0, 0)]  # the student's virtual stage, the layers there, those of them below the student
    if variant == "student stage":
        most = -(-total // stages) + 1
        places = [(o, c, j) for o in range(stages) for c in range(1, most + 1) for j in range(c)]
    for owner, here, below in places:
        parts = case.parts([0] * stages, variant, owner)
        load = [0.0] * case.ranks
        for stage in range(stages):
            load[stage % case.ranks] += parts["forward"][stage] + parts["backward"][stage]
        split = [0] * stages
        todo = [(list(range(stages)), total)]
        if variant == "student stage":
            split[owner] = here
            load[owner % case.ranks] += here * parts["layer"]
            early = case.layer - 1 - below
            todo = [(list(range(owner)), early), (list(range(owner + 1, stages)), total - early - here)]
        if any(layers < 0 or (layers and not where) for where, layers in todo):
            continue
        for where, layers in sorted(todo, key=lambda item: item[1]):  # the larger part evens out the smaller one
            for _ in range(layers):
                stage = min(where, key=lambda i: (round(load[i % case.ranks], 9), split[i], i))
                split[stage] += 1
                load[stage % case.ranks] += parts["layer"]
        yield tuple(split)
