"""Scores of captions, held to numbers that the reference implementation (pycocoevalcap 1.2) gave of the same words, and
words to those that its tokenizer (Stanford's PTBTokenizer 3.4.1) made of the same captions."""

import random

import pytest

from mitrain.tasks.caption_metrics import caption_metrics, longest_common, tokens

WORDS = "a the man dog cat on in red blue ball running with of table grass two people sitting".split()


def drawn(seed, images=20):
    """Captions near to one of their references, and one to five references."""
    random_ = random.Random(seed)
    line = lambda: " ".join(random_.choice(WORDS) for _ in range(random_.randint(1, 12)))  # noqa: E731
    references = [[line() for _ in range(random_.randint(1, 5))] for _ in range(images)]
    said = []
    for several in references:
        words = random_.choice(several).split()
        if random_.random() < 0.6:
            words[random_.randrange(len(words))] = random_.choice(WORDS)
        if random_.random() < 0.3:
            words = words[:-2] or words
        said.append(" ".join(words))
    return said, references


@pytest.mark.parametrize(
    ("seed", "cider", "bleu4", "rouge_l"),
    [
        (0, 2.7828850320962824, 0.7985663791947901, 0.8261798839511041),
        (1, 3.9586377789924705, 0.7402070334814487, 0.846002379523646),
        (2, 3.4927736777553617, 0.7638404969990733, 0.8894138245776896),
        (3, 2.509600732046015, 0.8067273044185008, 0.7347436311664086),
        (4, 3.7772343184508514, 0.8537955179610959, 0.8485350544025911),
    ],
)
def test_scores_are_those_of_the_reference_implementation(seed, cider, bleu4, rouge_l):
    expected = {"cider": cider, "bleu4": bleu4, "rouge_l": rouge_l}
    assert caption_metrics(*drawn(seed)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("said", "references", "cider", "bleu4", "rouge_l"),
    [
        (["a dog"], [["a dog", "the dog"]], 0.0, 0.0009999999991250007, 1.0),  # one picture: no word is rare
        (["x y", "a b c d e"], [["p q"], ["a b c d e"]], 5.0, 0.8694417435101199, 0.5),
        (["a", "b"], [["a"], ["c b"]], 2.1216921748800703, 1.91801835421769e-05, 0.8144329896907216),
        (["cat on a table", "cat"], [["cat on a table"] * 2, ["dog"]], 5.0, 0.9457416083332761, 0.5),
    ],
)
def test_scores_at_the_edges(said, references, cider, bleu4, rouge_l):
    expected = {"cider": cider, "bleu4": bleu4, "rouge_l": rouge_l}
    assert caption_metrics(said, references) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_nothing_said_scores_nothing():
    found = caption_metrics(["", "!"], [["a dog"], ["two cats"]])
    assert found["cider"] == found["rouge_l"] == 0.0 and found["bleu4"] < 1e-6


def test_words_are_rare_by_pictures_and_not_by_captions():
    """Told three times of one picture, a word is as rare as told once."""
    said = ["zebra", "a dog"]
    once, thrice = (caption_metrics(said, [["zebra"] * n, ["a dog"]])["cider"] for n in (1, 3))
    assert once == pytest.approx(thrice)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
        (
            "Two black-and-white dogs don't fight over the man's frisbee!",
            "two black-and-white dogs do n't fight over the man 's frisbee",
        ),
        ("The kids' toys are on the 3rd floor/roof.", "the kids toys are on the 3rd floor/roof"),
        (
            "He'll cannot gonna they've I'm we'd you're James' o'clock",
            "he 'll can not gon na they 've i 'm we 'd you 're james o'clock",
        ),
        ("A cat sits on a table , looking at the camera .", "a cat sits on a table looking at the camera"),
        ("an email to a.b@c.com or www.x.org", "an email to a.b@c.com or www.x.org"),
        ("A woman is walking...with her dog.", "a woman is walking with her dog"),
        ("Ein Hund läuft über die Straße.", "ein hund läuft über die straße"),
        ("one--two - three – four — five", "one two three four five"),
        ("A STOP sign.A tree.", "a stop sign.a tree"),
        ("semi- and full-size ice-cream cones", "semi and full-size ice-cream cones"),
        ("costs $1,000.50 & 50% off at 2:50", "costs $ 1,000.50 & 50 % off at 2:50"),
    ],
)
def test_words_are_parted_as_the_penn_treebank_parts_them(text, words):
    assert tokens(text) == words.split()


def test_brackets_stay_and_quotes_of_any_kind_go():
    assert tokens("“one” (two) ‘three’ it’s") == ["one", "(", "two", ")", "three", "it", "'s"]


def test_the_longest_common_subsequence():
    assert longest_common("a b c d".split(), "x a c y d".split()) == 3
    assert longest_common([], ["a"]) == longest_common(["a"], []) == 0
