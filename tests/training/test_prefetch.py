"""Batches that a thread makes ahead: their order, the cursor behind them, and what the thread must not do."""

import threading

import pytest

from mitrain.data.cache import FeatureCache, NotKept, reading_ahead
from mitrain.data.loader import Loader
from mitrain.training.prefetch import Batches

SAMPLES = list(range(7))


def numbers(draws):
    return [draw.sample for draw in draws]


def batches(make=numbers, ahead=True):
    return Batches(Loader(SAMPLES, 3, 1), make, ahead)


@pytest.mark.parametrize("ahead", [False, True])
def test_order_and_cursor_are_the_loaders(ahead):
    plain, made = Loader(SAMPLES, 3, 1), batches(ahead=ahead)
    assert made.state() == plain.state()
    for _ in range(9):
        draws, expected = made.next(), plain.next()
        assert numbers(draws) == numbers(expected) == made.of(draws)
        assert [d.random.random() for d in draws] == [d.random.random() for d in expected]
        assert made.state() == plain.state()
    made.close()


def test_a_cursor_that_is_loaded_drops_what_was_made_ahead():
    made, plain = batches(), Loader(SAMPLES, 3, 1)
    states = [plain.state()]
    order = []
    for _ in range(5):
        order.append(numbers(plain.next()))
        states.append(plain.state())
    for _ in range(4):
        made.next()
    for start in (1, 3, 0):
        made.load_state(states[start])
        assert made.state() == states[start]
        assert [made.of(made.next()) for _ in range(start, 5)] == order[start:]
    made.close()


def test_the_next_batch_is_made_by_another_thread_while_a_step_runs():
    threads, second = [], threading.Event()

    def make(draws):
        threads.append(threading.current_thread())
        if len(threads) == 2:
            second.set()
        return numbers(draws)

    made = batches(make)
    draws = made.next()
    assert second.wait(60) and made.of(draws) == numbers(draws)  # nobody has asked for the second one
    assert threading.main_thread() not in threads
    made.close()


def test_what_is_not_kept_is_made_when_it_is_asked_for():
    seen = []

    def make(draws):
        if threading.current_thread() is not threading.main_thread():
            raise NotKept
        seen.append(numbers(draws))
        return numbers(draws)

    made, plain = batches(make), Loader(SAMPLES, 3, 1)
    for _ in range(4):
        draws = made.next()
        assert made.of(draws) == numbers(plain.next()) == seen[-1]
    made.close()


def test_an_error_is_raised_for_its_own_batch():
    def make(draws):
        made_of.append(draws)
        if len(made_of) == 3:
            raise ValueError("the third")
        return numbers(draws)

    made_of: list = []
    made = batches(make)
    for _ in range(2):
        made.of(made.next())
    with pytest.raises(ValueError, match="the third"):
        made.next()
    made.close()


def test_ahead_a_cache_computes_nothing_and_changes_nothing(tmp_path):
    def cache():
        return FeatureCache(tmp_path, {"of": "this"}, {"x": "float32"})

    cache().fill(["a", "b"], lambda keys: {key: {"x": [[1.0, 2.0]]} for key in keys})
    again = cache()
    with reading_ahead():
        assert again.read(["a"], pytest.fail)[0]["x"].tolist() == [[1, 2]]
        with pytest.raises(NotKept):
            again.read(["a", "c"], pytest.fail)
    (file,) = tmp_path.glob("*/*/x.npy")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    damaged = cache()
    with reading_ahead(), pytest.raises(NotKept):
        damaged.read(["b"], pytest.fail)
    assert file.exists() and "b" in damaged
    assert damaged.read(["b"], lambda keys: {key: {"x": [[5.0, 6.0]]} for key in keys})[0]["x"].tolist() == [[5, 6]]
    assert not file.exists()


@pytest.mark.parametrize("kept", [True, False])
def test_a_batch_that_is_made_again_begins_with_the_same_choices(kept):
    def choices(draws):
        found = [draw.random.random() for draw in draws]
        if threading.current_thread() is not threading.main_thread() and not kept:
            raise NotKept  # after some choices were made
        return found

    made, plain = batches(choices), batches(choices, ahead=False)
    for _ in range(4):
        assert made.of(list(made.next())) == plain.of(plain.next())  # a list of its own, as of a permuted batch
        assert made.of(made.next()) == plain.of(plain.next())
    made.close()


def test_after_its_end_the_order_goes_on():
    made, plain = batches(), Loader(SAMPLES, 3, 1)
    assert [numbers(made.next()), made.close(), numbers(made.next())][::2] == [numbers(plain.next()) for _ in range(2)]
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("next batch")]
