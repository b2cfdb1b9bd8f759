"""Which questions are answered without the video, and how sure that is.

Here because "more than half of ten models are right from the text" (paper, Section 2.2) is also
what luck does: with two options for a third of the questions, with four for one in fifty. So there
are two answers: the paper's majority, and the probability that most models know the answer, given
how often questions of its kind are answered. Next: `audit.py` and `curate.py`.
"""

import numpy as np

from apollo.curation.records import Labels, Pool

WITHOUT_VIDEO = ("text", "frame")  # in the order in which a question is dropped for them
GRID = (np.arange(50) + 0.5) / 50  # of shares of models that answer a question
NUM_ROUNDS = 300
PRIOR_QUESTIONS = 20  # that a kind of question is worth before it is looked at: those of all kinds


def majority(pool: Pool, condition: str) -> np.ndarray:
    """Whether more than half of the models are right under a condition: bool (Q,)."""
    right, ran = pool.counts(condition)
    return 2 * right > ran


def answerable(pool: Pool, condition: str, kinds: Labels | None = None) -> np.ndarray:
    """Probability that more than half of all such models know the answer: float (Q,).

    Of models half of which know and half guess, a share of (1 + chance) / 2 is right: that is the
    limit, 0.625 for four options. Where the number of options is not known it is a half.

    The share of models that answer a question is taken to be distributed over the questions of a
    kind in any way at all; that distribution is estimated from how many models answered how many
    of them (nonparametric maximum likelihood, Kiefer and Wolfowitz 1956, by EM on a grid), and the
    question's own answers then say where in it the question lies. So where blind models guess, the
    few questions that most of them guessed right are known to be luck.

    Args:
        pool: The predictions.
        condition: Such as "text".
        kinds: Of the questions, such as their families; all questions are of one kind by default.
    """
    right, ran = pool.counts(condition)
    base = int(ran.max(initial=0)) + 1
    outcomes, of = np.unique(ran.astype(np.int64) * base + right, return_inverse=True)
    models, successes = np.divmod(outcomes, base)
    likelihood = GRID ** successes[:, None] * (1 - GRID) ** (models - successes)[:, None]
    codes = np.zeros(len(right), np.int64) if kinds is None else kinds.codes
    num_kinds = 1 if kinds is None else len(kinds.names)
    counts = np.bincount(codes * len(outcomes) + of, minlength=num_kinds * len(outcomes))
    counts = counts.reshape(num_kinds, len(outcomes)).astype(float)
    uniform = np.full((1, len(GRID)), 1 / len(GRID))
    overall = _mixture(counts.sum(axis=0, keepdims=True), likelihood, uniform)
    weights = _mixture(counts, likelihood, overall)
    found = np.empty(len(right))
    for num_options in np.unique(pool.num_options):
        rows = pool.num_options == num_options
        limit = (1 + (1 / num_options if num_options else 0)) / 2
        above = ((weights * (GRID > limit)) @ likelihood.T) / (weights @ likelihood.T)
        found[rows] = above[codes[rows], of[rows]]
    return found


def _mixture(counts: np.ndarray, likelihood: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Weights of the grid for each kind: (kinds, grid), by EM.

    Args:
        counts: (kinds, outcomes), questions.
        likelihood: (outcomes, grid).
        prior: (1, grid), worth `PRIOR_QUESTIONS`.
    """
    weights = np.repeat(prior, len(counts), axis=0)
    total = counts.sum(axis=1, keepdims=True) + PRIOR_QUESTIONS
    for _ in range(NUM_ROUNDS):
        expected = weights * ((counts / (weights @ likelihood.T)) @ likelihood)
        weights = (expected + PRIOR_QUESTIONS * prior) / total
    return weights


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
