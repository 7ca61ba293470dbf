"""Rule-based rewards. `None` means the rollout has no reward: it leaves its group's statistics, it
is not a 0."""

from r4b_jax.data.examples import Question
from r4b_jax.data.worlds import TOPICS


def maths_reward(question: Question, answer: str | None) -> float | None:
    """1.0 if the answer is the right number, 0.0 if not or if the reply was cut off (`answer`
    None).

    Only maths is rewarded (PAPER.md section 5): a question of another topic gets None.
    """
    if TOPICS.get(question.topic) != "reasoning":
        return None
    if answer is None:
        return 0.0
    try:
        return float(int(answer) == int(question.answer))
    except ValueError:
        return 0.0
