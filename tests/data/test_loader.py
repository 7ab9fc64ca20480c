"""The loader: every sample once an epoch, and a cursor from which it continues exactly."""

import pytest

from mitrain.core import dist
from mitrain.core.dist import RankInfo
from mitrain.data.loader import Loader


def draws(loader, batches):
    return [(d.sample, d.epoch, d.random.random()) for _ in range(batches) for d in loader.next()]


def test_every_epoch_holds_every_sample_once_in_another_order():
    loader = Loader(list(range(10)), 5, seed=1)
    first, second = [[d.sample for _ in range(2) for d in loader.next()] for _ in range(2)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_a_sample_is_drawn_with_other_choices_in_every_epoch():
    loader = Loader(list(range(6)), 6, seed=1)
    epochs = [{d.sample: d.random.random() for d in loader.next()} for _ in range(4)]
    assert all(len({epoch[sample] for epoch in epochs}) == 4 for sample in range(6))
    assert len({choice for epoch in epochs for choice in epoch.values()}) == 24


def test_batches_are_full_across_epochs():
    loader = Loader(list(range(7)), 5, seed=1)
    assert all(len(loader.next()) == 5 for _ in range(7))
    assert loader.state() == {"epoch": 4, "position": 7, "samples": 7}


def test_resuming_continues_with_the_same_draws():
    whole, first = Loader(list("abcdefg"), 3, seed=4), Loader(list("abcdefg"), 3, seed=4)
    expected = draws(whole, 8)
    begun = draws(first, 3)
    resumed = Loader(list("abcdefg"), 3, seed=4)
    resumed.load_state(first.state())
    assert begun + draws(resumed, 5) == expected


@pytest.mark.parametrize("count", [103, 100, 7, 3])
def test_batches_of_about_one_length_hold_every_sample_once_an_epoch(count):
    lengths = [(37 * i) % 41 for i in range(count)]
    loader, plain = Loader(list(range(count)), 5, 1, lengths), Loader(list(range(count)), 5, 1)
    batches = [[draw.sample for draw in loader.next()] for _ in range(count)]
    drawn = [sample for batch in batches for sample in batch]
    epochs = [drawn[start : start + count] for start in range(0, 5 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs) and any(epoch != epochs[0] for epoch in epochs)

    def padding(batches):
        return sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)

    assert count < 50 or padding(batches) < padding([[d.sample for d in plain.next()] for _ in range(count)]) / 5
    shortest = [min(lengths[i] for i in batch) for batch in batches[: count // 5]]
    assert count < 50 or shortest != sorted(shortest)


def test_batches_of_about_one_length_are_resumed():
    lengths = [5, 1, 4, 1, 3, 9, 2]
    whole, first, resumed = (Loader(list("abcdefg"), 3, 4, lengths) for _ in range(3))
    expected = draws(whole, 8)
    begun = draws(first, 3)
    resumed.load_state(first.state())
    assert begun + draws(resumed, 5) == expected


def test_the_seed_decides():
    assert draws(Loader(list(range(9)), 3, seed=1), 3) != draws(Loader(list(range(9)), 3, seed=2), 3)


def test_a_cursor_of_other_data_is_refused():
    with pytest.raises(ValueError, match="^the cursor is for 9 samples, here are 8$"):
        Loader(list(range(8)), 2, 0).load_state({"epoch": 0, "position": 0, "samples": 9})
    with pytest.raises(ValueError, match=f"^the cursor is for {'x' * 20} samples, here are 8$"):
        Loader(list(range(8)), 2, 0).load_state({"epoch": 0, "position": 0, "samples": "x" * 30})
    with pytest.raises(ValueError, match="^a loader needs at least one sample$"):
        Loader([], 2, 0)


def test_of_other_data_the_next_epoch_begins_where_that_is_allowed():
    samples = list(range(8))
    here, plain, same = (Loader(samples, 8, 3) for _ in range(3))
    here.load_state({"epoch": 4, "position": 5, "samples": 9}, other_samples=True)
    assert here.state() == {"epoch": 5, "position": 0, "samples": 8}
    plain.load_state({"epoch": 5, "position": 0, "samples": 8})
    assert draws(here, 2) == draws(plain, 2)
    same.load_state({"epoch": 4, "position": 5, "samples": 8}, other_samples=True)
    assert same.state() == {"epoch": 4, "position": 5, "samples": 8}
    with pytest.raises(ValueError, match="the cursor is for 9 samples, here are 8"):
        here.load_state({"epoch": "4", "position": 5, "samples": 9}, other_samples=True)


@pytest.mark.parametrize(("epoch", "position"), [(-1, 0), (0, -1), (0.0, 0), (True, 0), (0, 9)])
def test_what_is_no_cursor_is_refused(epoch, position):
    loader = Loader(list(range(8)), 2, 0)
    with pytest.raises(ValueError, match=f"no cursor has epoch={epoch} and position={position}"):
        loader.load_state({"epoch": epoch, "position": position, "samples": 8})
    with pytest.raises(ValueError, match=f"^no cursor has epoch={'x' * 20} and position={'y' * 20}$"):
        loader.load_state({"epoch": "x" * 30, "position": "y" * 30, "samples": 8})
    loader.load_state({"epoch": 1, "position": 8, "samples": 8})
    assert loader.state() == {"epoch": 1, "position": 8, "samples": 8} and loader.next()[0].epoch == 2


def test_every_sample_comes_once_an_epoch_whatever_the_ranks_and_through_a_change_of_them():
    """Ranks 2, then 3, then 1, each with loaders of their own that continue from the cursor that was saved."""
    samples, batch, seed = list(range(31)), 7, 3
    alone, state, seen = Loader(samples, batch, seed), Loader(samples, batch, seed).state(), []
    for world, batches in ((2, 5), (3, 4), (1, 4), (8, 3)):
        loaders = [Loader(samples, batch, seed) for _ in range(world)]
        for loader in loaders:
            loader.load_state(state)
        for _ in range(batches):
            whole = [(d.sample, d.epoch, d.random.random()) for d in alone.next()]
            drawn = [loader.next()[dist.shard_of(batch, RankInfo(rank, world))] for rank, loader in enumerate(loaders)]
            assert [(d.sample, d.epoch, d.random.random()) for part in drawn for d in part] == whole
            seen += [sample for sample, _, _ in whole]
        state = loaders[-1].state()
        assert all(loader.state() == state for loader in loaders)
    epochs = [seen[start : start + 31] for start in range(0, len(seen) - 30, 31)]
    assert len(epochs) == 3 and all(sorted(epoch) == samples for epoch in epochs)
