# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Which class a word means, in calls and scripts alike, and where the names of classes go along."""

import copy

import pytest

from diffusers_d2it import D2iTPipeline
from diffusers_d2it.pipelines.labels import class_ids


NAMES = {0: "7", 1: "maillot", 2: "maillot, tank suit", 3: "caf\u00e9", 4: "12, dozen", 7: "swan"}


@pytest.mark.parametrize(
    "word, id",
    [
        (7, 7),  # a number is an id
        ("7", 0),  # a word is a name, also one of digits
        ("12", 4),
        ("3", 3),  # if no class is called so, it is an id
        ("maillot", 1),  # a whole name before a part of a longer one
        ("tank suit", 2),
        ("maillot, tank suit", 2),
        ("cafe\u0301", 3),  # as a file system writes the accent
    ],
)
def test_what_a_word_means(word, id):
    assert class_ids(word, 10, NAMES) == class_ids([word], 10, NAMES) == [id]


@pytest.mark.parametrize("word", ["5", "70", "-1", "1.0", "\u0661", "", "swans"])
def test_words_that_mean_no_class(word):
    with pytest.raises(ValueError, match="`class_labels`"):
        class_ids(word, 10, NAMES)


def test_digits_are_ids_of_a_model_without_names():
    assert class_ids(["3", "9"], 10, None) == [3, 9]
    with pytest.raises(ValueError, match="`class_labels`.*10"):
        class_ids("10", 10, None)


@pytest.mark.parametrize(
    "another",
    [
        D2iTPipeline.from_pipe,
        lambda pipe: D2iTPipeline(**pipe.components),
        lambda pipe: D2iTPipeline(**D2iTPipeline.from_pipe(pipe).components),
        copy.copy,
        copy.deepcopy,
    ],
    ids=["from_pipe", "components", "both", "copy", "deepcopy"],
)
def test_names_survive_in_another_pipeline(make_pipeline, another, tmp_path):
    pipe = another(make_pipeline(id2label={2: "cat", 9: "dog"}))
    assert pipe.id2label == {2: "cat", 9: "dog"}
    pipe.save_pretrained(tmp_path / "pipe")
    assert D2iTPipeline.from_pretrained(tmp_path / "pipe").id2label == {2: "cat", 9: "dog"}
