"""The accuracy of an answer that several people gave references for, as VQAv2 defines it.

The definition and the ways of writing that it takes for one: Antol et al. 2015, https://visualqa.org/evaluation.html.
"""

import re
from collections.abc import Sequence

# Contractions by their right spelling; what lacks one of a contraction's apostrophes is taken for it.
CONTRACTIONS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
SPELT = {word[:i] + word[i + 1 :]: word for word in CONTRACTIONS for i, sign in enumerate(word) if sign == "'"}
NUMBERS = {"none": "0"} | {
    word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = ("a", "an", "the")
MARKS = ';/[]"{}()=+\\_-><@`,?!'  # no apostrophe, which possessives have, and no colon, which times have
AGREE = 3
"""So many people who gave an answer make it wholly right."""


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean over all ways to leave one of the ``references`` out of min(1, how many of the others are the answer / 3)."""
    said = normalised(answer)
    same = [normalised(reference) == said for reference in references]
    return sum(min(1, (sum(same) - one) / AGREE) for one in same) / len(same)


def normalised(answer: str) -> str:
    """Lower case without articles, numbers up to ten as digits, contractions with their apostrophes, no punctuation.

    A mark between two words becomes a blank; one that stands beside a blank somewhere in the answer, and every mark where
    a comma parts digits (1,000), vanishes. A period stays before a digit.
    """
    text = plain = " ".join(answer.split())
    in_number = re.search(r"\d,\d", text) is not None
    for mark in MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside or in_number else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", plain).lower().split()]
    return " ".join(SPELT.get(word, word) for word in words if word not in ARTICLES)
