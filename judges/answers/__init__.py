"""Whether a teacher's reply gives the reference answer: correct, wrong, or unscored with its failure.

`verify` decides in this process; `VerifierPool` decides the same where a hostile formula costs one verdict at most.
"""

from judges.answers.choices import normalise_choice_answer
from judges.answers.inference import infer_answer_type, reference_problem
from judges.answers.pool import VerifierPool
from judges.answers.verification import verify

__all__ = ["VerifierPool", "infer_answer_type", "normalise_choice_answer", "reference_problem", "verify"]
