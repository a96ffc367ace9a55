import pytest

from learner.config import LearnerConfig


@pytest.mark.parametrize(
    "field, value",
    [
        ("batch_size", 0),
        ("batch_length", 1),
        ("publish_every_updates", 0),
        ("checkpoint_every_s", 0.0),
        ("keep_checkpoints", 0),
        ("log_every_s", float("nan")),
        ("metrics_port", 70000),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"learner\.{field}.*got {value}"):
        LearnerConfig(**{field: value})  # type: ignore[arg-type]
