"""Promise: what the service answers is what the streamed model says, whoever else asks at the same time."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from chainfed_ray.serving.classifier import Classifier
from tests.models import a_lora_classifier, a_saved_stack, class_logits

TEXTS = [
    "salt tide wave",
    "worm",
    "a much longer text about ships, stars and seeds, cut where it grows too long",
    "wind",
]


def test_alone_and_in_company_and_as_peft_says(tiny_model_folder: Path) -> None:
    saved = a_saved_stack(tiny_model_folder)
    classifier = Classifier(f"path:{tiny_model_folder}", torch.float32)
    together = classifier.probabilities(saved, TEXTS)
    torch.testing.assert_close(together.sum(-1), torch.ones(len(TEXTS)))
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(classifier.probabilities(saved, [text])[0], together[row], rtol=0, atol=1e-6)

    words = AutoTokenizer.from_pretrained(tiny_model_folder)
    batch = words(TEXTS, return_tensors="pt", padding=True, truncation=True, max_length=saved.max_length)
    logits = class_logits(tiny_model_folder, saved.stack, batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(together, logits.softmax(-1), rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_stacks_do_not_disturb_each_other(tiny_model_folder: Path) -> None:
    first, second = a_saved_stack(tiny_model_folder), a_saved_stack(tiny_model_folder, layers=(0, 3), classes=5, seed=1)
    classifier = Classifier(f"path:{tiny_model_folder}", torch.float32)
    before = classifier.probabilities(first, TEXTS)
    assert classifier.probabilities(second, TEXTS).shape == (len(TEXTS), 5)
    assert torch.equal(classifier.probabilities(first, TEXTS), before)


def test_texts_of_many_stacks_in_one_batch_are_each_stack_alone(tiny_model_folder: Path) -> None:
    """Of other kinds, layers, widths, classes and numbers of head layers, in an order that mixes their rows by length."""
    stacks = [
        a_saved_stack(tiny_model_folder),
        a_saved_stack(tiny_model_folder, layers=(0, 3), classes=5, seed=1, bottleneck=3),
        a_saved_stack(tiny_model_folder, layers=(3,), classes=2, seed=2),
        a_saved_stack(tiny_model_folder, layers=(0, 1, 2, 3), classes=4, seed=3, bottleneck=16),
        a_lora_classifier(tiny_model_folder, layers=(0, 2), seed=4),
        a_lora_classifier(tiny_model_folder, layers=(2, 3), classes=6, seed=5, rank=2),
    ]
    classifier = Classifier(f"path:{tiny_model_folder}", torch.float32)
    asked = [(saved, TEXTS[place:] + TEXTS[:1]) for place, saved in enumerate(stacks)]
    for (saved, texts), found in zip(asked, classifier.of_each(asked), strict=True):
        torch.testing.assert_close(found, classifier.probabilities(saved, texts), rtol=0, atol=1e-6)
