"""Near-duplicates: alike by shingles, found without comparing every pair."""

from __future__ import annotations

from collections.abc import Sequence

from curation.duplicates import clusters, shingles, sides
from ground.records import Demonstration, Message

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
]


def text(*replaced: int) -> str:
    """Fifty words in an order of their own; those at the places given are others."""
    own = [f"{WORDS[n % 14]}{WORDS[(n * 5) % 13]}" for n in range(50)]
    return " ".join("other" if n in replaced else word for n, word in enumerate(own))


def jaccard(one: str, other: str, words: int) -> float:
    a, b = set(shingles(one, words)), set(shingles(other, words))
    return len(a & b) / len(a | b)


def row(question: str, reply: str = "Yes.", answer: str = "", *before: Message) -> Demonstration:
    messages = (*before, Message("user", question), Message("assistant", reply))
    return Demonstration("", messages, "chat", answer=answer)


def found(texts: Sequence[str | Demonstration], similarity: float = 0.8) -> list[int]:
    rows = [row(each) if isinstance(each, str) else each for each in texts]
    return clusters([sides(each) for each in rows], similarity=similarity, words=5).tolist()


def test_shingles_keep_numbers_and_signs_apart():
    assert shingles("Add 12+3 now", 3) == ["add 12 +", "12 + 3", "+ 3 now"]
    assert shingles("a_b", 2) == ["a _", "_ b"]
    assert shingles("Hi", 5) == ["hi"] and shingles("", 5) == [""]


def test_a_text_with_a_word_more_is_found_and_another_is_not():
    """One more word at the end: 46 of 47 shingles are common."""
    longer, strange = text() + " end", " ".join(reversed(text().split()))
    assert jaccard(text(), longer, 5) == 46 / 47
    assert found([strange, text(), longer, text()]) == [0, 1, 1, 1]


def test_half_alike_is_not_alike():
    """Four words changed far from each other cost 20 of 46 shingles: 26 / 66 are common."""
    changed = text(5, 15, 25, 35)
    assert jaccard(text(), changed, 5) == 26 / 66
    assert found([text(), changed]) == [0, 1]
    assert found([text(), changed], similarity=0.2) in ([0, 0], [0, 1]), "banding may miss it"


def test_tasks_that_differ_in_a_number_are_different():
    tasks = [f"Calculate {n} + {n + 1}.\n=>{2 * n + 1}" for n in range(200)]
    assert found(tasks) == list(range(200))


def test_a_chain_is_one_cluster_named_by_its_first():
    """Each is like the next, in one word of fifty."""
    steps = [text(*range(n)) for n in range(3)]
    assert jaccard(steps[0], steps[1], 5) > 0.9
    assert found([*steps[::-1], "quite another text"]) == [0, 0, 0, 3]


def test_the_estimate_is_as_good_as_its_docstring_says():
    """J = 46/47 = 0.98: 60 pairs of different texts, all found; J = 0.39: none is."""
    pairs = []
    for n in range(60):
        own = " ".join(f"{word}{n}" for word in text().split())
        pairs += [own, own + " end"]
    assert found(pairs) == [2 * (n // 2) for n in range(120)]


def test_equal_input_gives_equal_clusters_and_none_is_none():
    texts = [text(n % 7, n % 11) for n in range(40)]
    first, second = (found(texts, similarity=0.7) for _ in range(2))
    assert first == second and len(set(first)) < 40
    assert found([]) == []


def test_a_long_task_with_other_numbers_or_another_answer_is_another_task():
    """100 words, one number of them changed: 95 of 101 shingles are common, and yet two tasks."""
    story = f"{text()} {' '.join(reversed(text().split()))}"
    tasks = [f"{story} {number} {text()}" for number in (48, 60, 48)]
    assert jaccard(tasks[0], tasks[1], 5) > 0.9
    assert found(tasks) == [0, 1, 0]
    assert found([row(story, "Yes."), row(story, "Yes.", "no"), row(story, "Yes.")]) == [0, 1, 0]


def test_question_and_answer_have_to_be_alike_each():
    """A long document in both, and another question, or the same and another short answer."""
    long, other = text(), " ".join(reversed(text().split()))
    assert found([row(long, "Yes."), row(long, "No."), row(long + " now", "Yes.")]) == [0, 1, 0]
    assert found([row("Why?", long), row("How?", long), row("Why?", long + " end")]) == [0, 1, 0]
    assert found([row(long, other), row(other, long)]) == [0, 1]


def test_the_system_message_is_not_compared_and_earlier_turns_are_exactly():
    rules, first = Message("system", text()), (Message("user", "Hi"), Message("assistant", "Yes?"))
    told = row("Go on, please.", "Yes.", "", rules)
    assert found([told, row("What is new today?", "Yes.", "", rules)]) == [0, 1]
    assert found([told, row("Go on, please.")]) == [0, 0]
    assert found([told, row("Go on, please.", "Yes.", "", *first)]) == [0, 1]


def test_rows_of_one_template_are_told_apart_by_what_is_their_own():
    """A word of 51 differs, 46 of 48 shingles are common; a row twice stays a duplicate."""
    letters = "abcdefghijklmnopqrst"
    rows = [f"{text()} {letter * 3}" for letter in letters]
    assert found(rows) == list(range(20))
    assert found([*rows, rows[3] + "?", rows[4]])[-1] == 4


def test_a_letter_is_a_word_where_nobody_writes_blanks():
    """One letter more in 40: found, and it would not be if the text were one word."""
    sky = "请解释一下为什么天空是蓝色的以及傍晚时为什么会变成红色请用通俗易懂的语言回答"
    assert shingles("蓝色 sky 3", 2) == ["蓝 色", "色 sky", "sky 3"]
    assert shingles("ทำไม", 9)[0].split() == ["ท", "ำ", "ไ", "ม"]
    assert found([sky, sky + "吧", sky[::-1]]) == [0, 0, 2]
