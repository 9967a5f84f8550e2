"""What a task's process does with what it is given, where that can be told without training."""

from kdstore.study.work import choose, without_unread


def judged(image, text):
    return {"rows": [{"row": "model", "scores": {"image_retrieval_recall@1": image, "text_retrieval_recall@1": text}}, {"row": "ceiling", "scores": {}}]}


def test_a_sweep_takes_the_best_over_both_directions_and_the_first_of_equals():
    choices = [{"lr": 1.0}, {"lr": 2.0}, {"lr": 3.0}]
    chosen, tried = choose(choices, [judged(9.0, 1.0), judged(5.0, 7.0), judged(7.0, 5.0)])
    assert chosen == {"lr": 2.0}
    assert tried == [{"settings": choice, "score": score} for choice, score in zip(choices, (5.0, 6.0, 6.0), strict=True)]
    assert choose([], []) == ({}, [])


def test_a_loss_is_not_told_settings_that_none_of_its_terms_reads():
    said = {"teacher_temperature": 50.0, "token_standard": "phi-s", "lr": 1e-3}
    assert without_unread({**said, "loss": "clip-kd"}).keys() == {"loss", "lr", "teacher_temperature"}
    assert without_unread({**said, "loss": "fd"}).keys() == {"loss", "lr"}
