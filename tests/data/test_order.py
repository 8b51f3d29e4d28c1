import pytest

from hydra_hf.data.order import OrderInBlocks, key_of, shuffled


def order(length: int, key: int = 7) -> list[int]:
    return [shuffled(place, length, key) for place in range(length)]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 16, 17, 100, 255, 256, 257, 1000, 4097])
def test_a_shuffled_order_has_every_number_once(length):
    assert sorted(order(length)) == list(range(length))


def test_orders_of_two_keys_or_lengths_differ():
    assert order(100) == order(100)
    assert order(100) != order(100, 8)
    assert order(100) != [number for number in order(101) if number < 100]
    assert key_of(1, 2) != key_of(12) != key_of(2, 1)


def test_all_orders_of_four_are_equally_likely():
    counts = {}
    for key in range(2400):
        made = tuple(order(4, key_of(key)))
        counts[made] = counts.get(made, 0) + 1
    assert len(counts) == 24
    assert 60 < min(counts.values()) <= max(counts.values()) < 150


def test_neighbours_are_carried_apart():
    length = 10_000
    made = order(length, 3)
    correlation = sum((a - length / 2) * (b - length / 2) for a, b in zip(made, made[1:])) / length / (length**2 / 12)
    assert abs(correlation) < 0.05
    assert sum(number == place for place, number in enumerate(made)) < 8


def test_a_place_among_a_hundred_million_needs_no_list():
    import tracemalloc

    tracemalloc.start()
    places = {shuffled(place, 100_000_000, 5) for place in range(1000)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(places) == 1000
    assert max(places) < 100_000_000
    assert peak < 1_000_000


PARTS = [range(0, 30), range(30, 31), range(40, 90), range(100, 110), range(110, 112), range(200, 205)]


@pytest.mark.parametrize("block_size", [1, 8, 64, 1024])
def test_an_order_in_blocks_has_every_record_once(block_size):
    places = OrderInBlocks(PARTS, key=3, block_size=block_size)
    assert sorted(places[place] for place in range(98)) == [number for part in PARTS for number in part]


def test_an_order_in_blocks_reads_a_part_at_a_time():
    parts = [range(100 * part, 100 * part + 100) for part in range(20)]
    places = OrderInBlocks(parts, key=3, block_size=250)
    read = [places[place] for place in range(2000)]
    assert [len({number // 100 for number in read[start : start + 200]}) for start in range(0, 2000, 200)] == [2] * 10
    assert read[:100] != sorted(read[:100])
    assert read != [OrderInBlocks(parts, key=4, block_size=250)[place] for place in range(2000)]
    assert places.block_of(399) == (1, range(200, 400))
