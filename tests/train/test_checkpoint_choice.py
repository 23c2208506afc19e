"""Which of two models a validation prefers."""

import pytest

from hsl_node.train.checkpoint import Validation


@pytest.mark.parametrize(
    ("one", "other", "better"),
    [
        (Validation(0.8, 0.9), Validation(0.7, 0.1), True),  # the AUC decides
        (Validation(0.7, 0.1), Validation(0.8, 0.9), False),
        (Validation(1.0, 0.2), Validation(1.0, 0.3), True),  # equal AUCs: the lower loss
        (Validation(1.0, 0.3), Validation(1.0, 0.3), False),  # equal in both: the earlier one stays
        (Validation(None, 0.2), Validation(None, 0.3), True),  # one class only: the loss
        (Validation(None, None), Validation(None, None), True),  # no validation images: the later epoch
    ],
)
def test_a_higher_auc_wins_and_equal_ones_are_decided_by_loss(one: Validation, other: Validation, better: bool) -> None:
    assert one.better_than(other) is better
