"""Item-response theory: a two-parameter logistic model of who answers what right.

Here because it is the usual way to choose few questions (tinyBenchmarks, arXiv 2402.14992), and an
alternative to the paper's entropy has to be at hand to say whether entropy is any good. A model of
ability t answers a question right with probability sigmoid(slope t + ease). Abilities and questions
are fitted in turns by a few Newton steps each, at the maximum of the posterior: with ten models, no
question's two numbers are known without a prior. Numpy alone: libraries for this fit thousands of
people and some hundred questions; here it is thirty models and a million questions. Next:
`discrimination.py`.
"""

import numpy as np

from apollo.curation.records import Pool

SLOPE_SD, EASE_SD = 0.5, 1.5
"""Priors: slope ~ N(1, 0.5), not below 0.05, ease ~ N(0, 1.5); abilities ~ N(0, 1). Our choice."""
NUM_TURNS = 5
NUM_STEPS = 2  # of Newton, in a turn
MAX_FITTED = 4000  # questions that the abilities are fitted on: these tell them to 0.02 or so
CHUNK = 65_536  # questions at once: their probabilities stay in the cache


def fit_pool(pool: Pool, condition: str = "video") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit abilities (M,), slopes (Q,) and eases (Q,); models that did not run count as unknown."""
    ran = pool.ran[pool.place(condition)][:, pool.columns["benchmark"].codes]
    return fit(pool.right(condition), None if ran.all() else ran)


def fit(
    right: np.ndarray, known: np.ndarray | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit the model.

    Args:
        right: bool (M models, Q questions).
        known: bool (M, Q), which of these count; None for all.
        seed: Of the sample that the abilities are fitted on.

    Returns:
        Abilities (M,) with mean 0 and deviation 1, slopes (Q,) and eases (Q,).
    """
    num_models, num_questions = right.shape
    rows = np.arange(num_questions)
    if num_questions > MAX_FITTED:
        rows = np.random.default_rng(seed).choice(rows, MAX_FITTED, replace=False)
    sample = right[:, rows].astype(np.float32)
    weight = None if known is None else known[:, rows].astype(np.float32)
    counts = len(rows) if weight is None else weight.sum(axis=1)
    score = (sample if weight is None else sample * weight).sum(axis=1) / np.maximum(counts, 1)
    ability = _standardised(score.astype(np.float32))
    slope, ease = np.ones(len(rows), np.float32), np.zeros(len(rows), np.float32)
    for _ in range(NUM_TURNS):
        slope, ease = _fit_questions(sample, ability, weight, slope, ease, NUM_STEPS)
        ability = _standardised(_fit_abilities(sample, ability, weight, slope, ease))
    slope, ease = np.ones(num_questions, np.float32), np.zeros(num_questions, np.float32)
    for start in range(0, num_questions, CHUNK):
        part = slice(start, start + CHUNK)
        slope[part], ease[part] = _fit_questions(
            right[:, part].astype(np.float32),
            ability,
            None if known is None else known[:, part].astype(np.float32),
            slope[part],
            ease[part],
            3 * NUM_STEPS,
        )
    return ability, slope, ease


def _standardised(ability: np.ndarray) -> np.ndarray:
    """Mean 0, deviation 1; all zero where all are the same."""
    spread = ability.std()
    return (ability - ability.mean()) / spread if spread > 1e-6 else np.zeros_like(ability)


def _fit_questions(
    right: np.ndarray,
    ability: np.ndarray,
    weight: np.ndarray | None,
    slope: np.ndarray,
    ease: np.ndarray,
    num_steps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Newton steps on slope and ease of each question, given the abilities."""
    squares = ability**2
    for _ in range(num_steps):
        chance = _sigmoid(ability[:, None] * slope + ease)
        error = right - chance
        spread = chance * (1 - chance)
        if weight is not None:
            error, spread = error * weight, spread * weight
        to_slope = ability @ error - (slope - 1) / SLOPE_SD**2
        to_ease = error.sum(axis=0) - ease / EASE_SD**2
        h_ss = squares @ spread + 1 / SLOPE_SD**2
        h_se, h_ee = ability @ spread, spread.sum(axis=0) + 1 / EASE_SD**2
        determinant = h_ss * h_ee - h_se**2
        slope = slope + np.clip((h_ee * to_slope - h_se * to_ease) / determinant, -1, 1)
        ease = ease + np.clip((h_ss * to_ease - h_se * to_slope) / determinant, -2, 2)
        slope = np.maximum(slope, 0.05)  # who is better is not less likely to be right
    return slope, ease


def _fit_abilities(
    right: np.ndarray,
    ability: np.ndarray,
    weight: np.ndarray | None,
    slope: np.ndarray,
    ease: np.ndarray,
) -> np.ndarray:
    """Newton steps on the ability of each model, given the questions."""
    for _ in range(NUM_STEPS):
        chance = _sigmoid(ability[:, None] * slope + ease)
        error, spread = right - chance, chance * (1 - chance)
        if weight is not None:
            error, spread = error * weight, spread * weight
        step = (error @ slope - ability) / (spread @ slope**2 + 1)
        ability = ability + np.clip(step, -1, 1)
    return ability


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logit, -30, 30)))


def mean_information(ability: np.ndarray, slope: np.ndarray, ease: np.ndarray) -> np.ndarray:
    """Fisher information about an ability, averaged over these abilities: (Q,)."""
    total = np.zeros(len(slope), dtype=np.float32)
    for each in ability:
        chance = _sigmoid(each * slope + ease)
        total += slope**2 * chance * (1 - chance)
    return total / len(ability)
