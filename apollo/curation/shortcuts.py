"""Which questions are answered without the video, and how sure that is.

Here because "more than half of ten models are right from the text" (paper, Section 2.2) is also
what luck does: with two options for a third of the questions, with four for one in fifty, and for
far more where the models are kin and guess alike. So there are two answers: the paper's majority,
and the probability that models know the answer, given how they agree on wrong options. Next:
`audit.py` and `curate.py`.
"""

import numpy as np

from apollo.curation.records import WRONG, Labels, Pool

WITHOUT_VIDEO = ("text", "frame")  # in the order in which a question is dropped for them
GRID = (np.arange(50) + 0.5) / 50  # of shares of models that choose an option
NUM_ROUNDS = 100
PRIOR_QUESTIONS = 5  # that a kind of question is worth before it is looked at: those of all kinds


def majority(pool: Pool, condition: str) -> np.ndarray:
    """Whether more than half of the models are right under a condition: bool (Q,)."""
    right, ran = pool.counts(condition)
    return 2 * right > ran


def answerable(pool: Pool, condition: str, kinds: Labels | None = None) -> np.ndarray:
    """Probability that more than half of all such models know the answer: float (Q,).

    Of models half of which know and half guess, a share of (1 + chance) / 2 is right: that is the
    least share for a question to count as known. Models that guess do not know which option is the
    right one, so they choose it as often as any other: how alike they guess is told by how many of
    them agree on a wrong option, and whoever agrees on the right one as often was lucky. A kind of
    question is a mixture of known and guessed ones; how large its part of known ones is, how alike
    models guess there, and which share is right where they know are estimated together (EM, each
    distribution being weights of a grid). Where files do not say which wrong option was chosen,
    models are taken to guess each on its own.

    Args:
        pool: The predictions.
        condition: Such as "text".
        kinds: Of the questions, such as their families; all questions are of one kind by default.
    """
    right, ran = pool.counts(condition)
    codes = np.zeros(len(right), np.int64) if kinds is None else kinds.codes
    found = np.zeros(len(right))
    for num_options in np.unique(pool.num_options):
        if num_options == 1:  # nothing to know
            continue
        rows = np.flatnonzero(pool.num_options == num_options)
        chosen = np.column_stack([right[rows], _wrong_options(pool, condition, rows)])
        limit = (1 + (1 / num_options if num_options else 0)) / 2
        found[rows] = _known(codes[rows], chosen, ran[rows], limit)
    return found


def _wrong_options(pool: Pool, condition: str, rows: np.ndarray) -> np.ndarray:
    """How many models chose each wrong option: (Q, options - 1), or (Q, 0) if that is not known."""
    place, answer = pool.place(condition), pool.answer[rows]
    chosen, num_options = pool.chosen[place][:, rows], int(pool.num_options[rows[0]])
    untold = (chosen < 0) & (pool.states[place][:, rows] == WRONG)
    if num_options < 2 or (answer < 0).any() or untold.any():
        return np.empty((len(rows), 0), np.int64)
    counts = np.stack([(chosen == option).sum(axis=0) for option in range(num_options)], axis=1)
    return counts[np.arange(num_options) != answer[:, None]].reshape(len(rows), -1)


def _known(codes: np.ndarray, chosen: np.ndarray, ran: np.ndarray, limit: float) -> np.ndarray:
    """Probability that each question is known: float (Q,).

    Args:
        codes: (Q,), kinds.
        chosen: (Q, options), how many models chose each option, the right one first; or that alone.
        ran: (Q,), of how many.
        limit: Least share of models that are right where most know.
    """
    _, codes = np.unique(codes, return_inverse=True)
    ran = ran.astype(np.int64)[:, None]
    base = ran.max(initial=0) + 1
    outcomes, places = np.unique(ran * base + chosen, return_inverse=True)
    places = places.reshape(chosen.shape)
    models, successes = np.divmod(outcomes[:, None], base)
    likelihood = GRID**successes * (1 - GRID) ** (models - successes)  # (outcomes, grid)
    # Questions of one kind with as many right are alike, and so are their options.
    pairs, of, questions = np.unique(
        codes * len(outcomes) + places[:, 0], return_inverse=True, return_counts=True
    )
    kind, outcome = np.divmod(pairs, len(outcomes))
    options, times = np.unique(of[:, None] * len(outcomes) + places, return_counts=True)
    pair, option = np.divmod(options, len(outcomes))
    cell = kind[pair] * len(outcomes) + option  # of a table of kinds by outcomes
    sizes = np.bincount(kind, questions)
    table = (len(sizes), len(outcomes))

    part = np.full(len(sizes), 0.2)  # of the questions of a kind that are known
    knowing = _normal(GRID * (GRID > limit))
    guessing = _normal(np.repeat(np.ones_like(GRID)[None], len(sizes), axis=0))
    if chosen.shape[1] == 1:
        guessing = _normal(guessing * (GRID <= limit))
    for _ in range(NUM_ROUNDS):
        if_known, if_guessed = likelihood @ knowing, guessing @ likelihood.T
        known = part[kind] * if_known[outcome]
        known = known / (known + (1 - part[kind]) * if_guessed[kind, outcome])
        in_all = known @ questions / questions.sum()
        part = np.bincount(kind, questions * known) + PRIOR_QUESTIONS * in_all
        part = part / (sizes + PRIOR_QUESTIONS)
        hits = np.bincount(outcome, questions * known, len(outcomes))
        knowing = _normal(knowing * ((hits / if_known) @ likelihood))
        luck = np.bincount(cell, (1 - known)[pair] * times, table[0] * table[1]).reshape(table)
        guessing = guessing * ((luck / if_guessed) @ likelihood) / chosen.shape[1]
        guessing = _normal(guessing + PRIOR_QUESTIONS * _normal(guessing.sum(axis=0)))
    return known[of]


def _normal(weights: np.ndarray) -> np.ndarray:
    """Weights that add up to one along the last axis."""
    return weights / weights.sum(axis=-1, keepdims=True)


def kinds_of(pool: Pool) -> Labels:
    """Benchmark and family, or class where there is no family: what `answerable` goes by."""
    finest = "family" if len(pool.columns["family"].names) > 1 else "class"
    benchmark, kind = pool.columns["benchmark"], pool.columns[finest]
    codes = benchmark.codes.astype(np.int64) * len(kind.names) + kind.codes
    kept, numbers = np.unique(codes, return_inverse=True)
    names = [
        f"{benchmark.names[code // len(kind.names)]} / {kind.names[code % len(kind.names)]}"
        for code in kept
    ]
    return Labels(numbers.astype(np.int32), tuple(names))
