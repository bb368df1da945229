import multiprocessing
import os
import signal
import time
from itertools import chain, islice

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from word_tokenizer import WordTokenizer

from kdtune.data import DatasetStats, EncodedRow, Loader, RowStream, TokenizedDataset, instruct_dataset
from kdtune.data.rows import RowEncoder
from kdtune.errors import ConfigError, DataError

NUM_EXAMPLES, BATCH_SIZE, NUM_BATCHES = 23, 4, 6


def numbered(size=NUM_EXAMPLES):
    """Example n is n + 2 long and holds its number."""
    return TokenizedDataset(
        (([n] * (n % 5 + 2), [True] * (n % 5 + 2)) for n in range(size)), DatasetStats("numbers", size)
    )


def rows(size):
    for number in range(size):
        yield {"number": number}


def encode(row):
    # Every seventh row has no label.
    return EncodedRow([row["number"]] * 3, [row["number"] % 7 != 6] * 3)


def stream(size=27, keep=None):
    source = IterableDataset.from_generator(rows, gen_kwargs={"size": size})
    return RowStream(source, RowEncoder(encode, keep), source="stream", shuffle_buffer=5)


def make(dataset, **settings):
    return Loader(dataset, **{"batch_size": BATCH_SIZE, "shuffle": True, "seed": 7, "pad_id": 0, **settings})


def take(loader, count):
    return [(batch.tokens, batch.labels, loader.position) for batch in islice(loader, count)]


def numbers(batch):
    return batch.tokens[:, 0].tolist()


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_example_once_and_the_last_batch_is_kept(shuffle):
    loader = make(numbered(), shuffle=shuffle)
    assert len(loader) == loader.batches_per_epoch == NUM_BATCHES
    epochs = [[numbers(next(loader)) for _ in range(NUM_BATCHES)] for _ in range(2)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4, 4, 4, 4, 4, 3]
        assert sorted(chain(*epoch)) == list(range(NUM_EXAMPLES))
    assert (epochs[0] == epochs[1]) is (not shuffle)
    assert (list(chain(*epochs[0])) == list(range(NUM_EXAMPLES))) is (not shuffle)


def test_position_counts_batches_handed_out():
    loader = make(numbered())
    assert loader.position == (0, 0)
    positions = [position for _, _, position in take(loader, 8)]
    assert positions == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1), (1, 2)]


def test_order_is_a_function_of_seed_and_epoch():
    first, again, other = make(numbered()), make(numbered()), make(numbered(), seed=8)
    orders = [[numbers(next(loader)) for _ in range(NUM_BATCHES)] for loader in (first, again, other)]
    assert orders[0] == orders[1] != orders[2]
    expected = np.random.default_rng((7, 0)).permutation(NUM_EXAMPLES)
    assert list(chain(*orders[0])) == expected.tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_seek_goes_on_as_if_never_interrupted(workers, shuffle):
    uninterrupted = take(make(numbered(), shuffle=shuffle), 15)
    for consumed in (3, 5, 6, 11):
        loader = make(numbered(), shuffle=shuffle, num_workers=workers)
        first = take(loader, consumed)
        resumed = make(numbered(), shuffle=shuffle, num_workers=workers)
        resumed.seek(list(loader.position))
        assert same(first + take(resumed, 15 - consumed), uninterrupted)
        del loader, resumed


@pytest.mark.parametrize("workers", [0, 2])
def test_a_running_loader_can_seek(workers):
    loader = make(numbered(), num_workers=workers)
    whole = take(loader, 9)
    loader.seek((0, 4))
    assert same(take(loader, 5), whole[4:])


def test_seek_does_not_read_what_it_passes():
    dataset = numbered()
    read = []
    fetch = TokenizedDataset.__getitem__

    class Watched(TokenizedDataset):
        def __getitem__(self, index):
            read.append(index)
            return fetch(self, index)

    dataset.__class__ = Watched
    loader = make(dataset)
    loader.seek((40, 5))
    assert len(numbers(next(loader))) == len(read) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(make(numbered(), num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_to_workers_do_not_break_the_step_that_runs(signum):
    expected = take(make(numbered()), 10)
    loader = make(numbered(), num_workers=2)
    first = take(loader, 2)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signum)
    if signum == signal.SIGTERM:
        for worker in workers:
            worker.join(timeout=10)
            assert worker.exitcode == 0
        time.sleep(0.1)  # DataLoader's handler of dying children would raise here.
        loader.seek(loader.position)  # Starts new workers.
    assert same(first + take(loader, 8), expected)


@pytest.mark.parametrize("position", [(0, NUM_BATCHES), (0, 99), (-1, 0), (0, -1)])
def test_seek_outside_an_epoch(position):
    with pytest.raises(
        DataError, match=r"numbers: no batch .* in epoch .*6 batches.*changed since the state was saved"
    ):
        make(numbered()).seek(position)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch_size": 0}, ConfigError, "batch_size=0: must be at least 1"),
        ({"seed": -1}, ConfigError, "seed=-1: must be at least 0"),
        ({"num_workers": -1}, ConfigError, "num_workers=-1"),
    ],
)
def test_errors(settings, error, message):
    with pytest.raises(error, match=message):
        make(numbered(), **settings)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shuffle", [True, False])
def test_stream_seek_goes_on_as_if_never_interrupted(workers, shuffle):
    uninterrupted = take(make(stream(), shuffle=shuffle), 15)  # 27 rows, 24 of them trainable: 6 batches an epoch
    assert [position for _, _, position in uninterrupted[:7]] == [*((0, n) for n in range(1, 6)), (1, 0), (1, 1)]
    for consumed in (3, 6, 8):
        loader = make(stream(), shuffle=shuffle, num_workers=workers)
        first = take(loader, consumed)
        resumed = make(stream(), shuffle=shuffle, num_workers=workers)
        resumed.seek(loader.position)
        assert same(first + take(resumed, 15 - consumed), uninterrupted)
        del loader, resumed


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_epochs_and_report(workers):
    loader = make(stream(size=30, keep=lambda row: row["number"] != 0), num_workers=workers)
    assert loader.batches_per_epoch is None
    with pytest.raises(TypeError):
        len(loader)
    epochs = []
    for epoch in range(2):
        seen = []
        while loader.position[0] == epoch:
            seen += numbers(next(loader))
        assert sorted(seen) == [n for n in range(1, 30) if n % 7 != 6]
        assert (loader.report.rows, loader.report.filtered, loader.report.untrainable) == (30, 1, 4)
        assert loader.report.examples == len(seen)
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_stream_report_counts_while_it_goes():
    loader = make(stream(), shuffle=False)
    next(loader)
    next(loader)
    assert (loader.report.rows, loader.report.untrainable) == (9, 1)


def test_unshuffled_stream_keeps_its_order():
    assert numbers(next(make(stream(), shuffle=False))) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_errors_keep_their_message(workers):
    with pytest.raises(DataError, match=r"^nothing to train on: stream: 0 examples from 27 rows, 27 filtered out"):
        next(make(stream(keep=lambda row: False), num_workers=workers))
    loader = make(stream(), num_workers=workers)
    loader.seek((0, 6))
    with pytest.raises(DataError, match=r"^stream: no batch 6 in epoch 0: an epoch has 6 batches"):
        next(loader)


def test_stream_takes_one_worker():
    with pytest.raises(ConfigError, match="num_workers=2: at most 1 for a streaming dataset"):
        make(stream(), num_workers=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_files_equal_files_in_memory(jsonl, workers):
    source = jsonl({"input": f"q{n}", "output": f"a{n}"} for n in range(10))
    memory = make(instruct_dataset(WordTokenizer(), source=source), shuffle=False)
    streamed = make(
        instruct_dataset(WordTokenizer(), source=source, streaming=True), shuffle=False, num_workers=workers
    )
    assert same(take(memory, 7), take(streamed, 7))


def test_bad_row_of_a_stream_is_named(jsonl):
    dataset = instruct_dataset(WordTokenizer(), source=jsonl([{"input": "a", "output": 1}]), streaming=True)
    with pytest.raises(DataError, match=r"rows.jsonl \(train\): row 1: column 'output' must hold text: found int"):
        next(make(dataset))
