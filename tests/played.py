"""A launch played on a model of a device that shares its memory's bandwidth and keeps what it read in an L2.

Every program draws a tile, takes some time to begin it, waits for what it must, streams its bytes, a quarter after the
other, and takes some time to end it. All that stream share the bandwidths; what comes from HBM counts against the
smaller one. L2 forgets what was read longest ago, by bytes that came in since; of what is read or written first to be
evicted a third counts. What two programs read at once comes from HBM once. Times and rates are those of an H200
(benchmarks/results/gpu_h200_tuning.jsonl), whose measured times the model gives back: test_played.py.
"""

import heapq
import random
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from schedule_model import records

from bssn_kernels.backends import _tables
from bssn_kernels.backends._geometry import FLAT

STEP_US = 0.25
COLUMNS = 128  # of a row, of which L2 remembers when they were read last
EVICTED_FIRST = 0.3
PARTS = 4  # of a tile, each read after the other
# By kind of tile: its name, how many arrays it reads and writes, whether the first of them is to stay in L2, for those
# who read it after. All others are first to be evicted.
KINDS = {
    _tables.INNER: ("inner", 1, True),
    _tables.OUTER: ("outer", 1, True),
    _tables.SCALE: ("scale", 2, False),
    _tables.DOT: ("dot", 2, True),
    _tables.UPDATE: ("update", 2, False),
    _tables.ROWS: ("rows", 1, True),
}


@dataclass(frozen=True)
class Device:
    """What a launch is played on; as it stands, an H200 with four programs an SM, each with 16 KiB on its way.

    Attributes:
        hbm, l2_rate: bytes in a microsecond of all programs together, and of one of them alone `each`.
        l2: bytes of it that keep what was read.
        before, after: microseconds of a tile that nothing streams in.
        sums: microseconds from the last tile of a step to the first that may follow it; one in twenty takes late_sums.
    """

    programs: int = 528
    hbm: float = 3.9e6
    l2_rate: float = 6e6
    each: float = 13e3
    l2: float = 45e6
    before: float = 2.25
    after: float = 2.25
    sums: float = 5.0
    late_sums: float = 18.0


@dataclass
class Played:
    """How a launch went.

    Attributes:
        us: how long it took. waited: share of the programs' time in which they waited for a counter.
        hbm: bytes that HBM moved. hits: by kind of tile: share of the bytes of its first array that were found in L2.
    """

    us: float
    waited: float
    hbm: float
    hits: dict[str, float]


class Weights:
    """When each block of each weight was read last, in bytes that came into L2 until then."""

    def __init__(self, schedule) -> None:
        self.geometries = schedule.geometries
        self.itemsize = schedule.itemsize
        shapes = [(g.P, -(-g.L // COLUMNS)) for g in schedule.geometries]
        self.read = [np.full(shape, -np.inf) for shape in shapes]

    def parts(self, tile: dict[str, int]) -> list[tuple[np.ndarray, int]]:
        """The blocks of a tile and their bytes, in parts, in the order in which they are read."""
        geometry, read = self.geometries[tile["layer"]], self.read[tile["layer"]]
        if tile["kind"] in (_tables.SCALE, _tables.DOT):
            begin, n, size = tile["row0"] * FLAT, tile["rows"], -(-tile["rows"] // PARTS)
            return [self._flat(geometry, read, begin + i, min(size, n - i)) for i in range(0, n, size)]
        first, end, chunks = tile["row0"], tile["row0"] + tile["rows"], tile["chunks"]
        if tile["kind"] in (_tables.INNER, _tables.ROWS) or chunks == 1:
            size = -(-tile["rows"] // PARTS)
            cuts = [(row, min(size, end - row), 0, chunks) for row in range(first, end, size)]
        else:
            size = -(-chunks // PARTS)
            cuts = [(first, tile["rows"], i, min(size, chunks - i)) for i in range(0, chunks, size)]
        return [self._cut(read, tile, *cut) for cut in cuts]

    def _flat(self, geometry, read: np.ndarray, begin: int, n: int) -> tuple[np.ndarray, int]:
        (first, col), (last, end) = divmod(begin, geometry.L), divmod(begin + n - 1, geometry.L)
        wide = read.shape[1]
        blocks = read.reshape(-1)[first * wide + col // COLUMNS : last * wide + end // COLUMNS + 1]
        return blocks, n * self.itemsize

    def _cut(self, read, tile, row: int, rows: int, chunk: int, chunks: int) -> tuple[np.ndarray, int]:
        col = tile["col0"] + chunk * tile["step"]
        wide = min((chunks - 1) * tile["step"] + tile["width"], tile["end"] - col)
        n = min(chunks * tile["width"], tile["end"] - col)
        columns = slice(col // COLUMNS, -(-(col + wide) // COLUMNS))
        return read[row : row + rows, columns], rows * n * self.itemsize


class Sums:
    """Counters, which are raised some time after the last tile of a block arrived."""

    def __init__(self, schedule, device: Device, rng: random.Random) -> None:
        self.blocks = records(schedule.blocks, _tables.BLOCK_FIELDS)
        self.arrived, self.counters = Counter(), Counter()
        self.ends: dict[int, list[float]] = defaultdict(list)
        self.coming: list[tuple[float, int]] = []
        self.device, self.rng = device, rng

    def arrive(self, number: int, now: float) -> None:
        block = self.blocks[number]
        self.arrived[number] += 1
        if self.arrived[number] < block["arrivals"]:
            return
        late = self.rng.random() < 0.05
        end = now + (self.device.late_sums if late else self.device.sums * self.rng.uniform(0.7, 1.3))
        ends = self.ends[block["then"]]
        ends.append(end)
        heapq.heappush(self.coming, (end, block["then"]))
        if len(ends) == block["then_target"]:
            raised = [block["done"]] + [block["batch"]] * (block["batch"] >= 0)
            for counter in raised:
                heapq.heappush(self.coming, (max(ends) + 1, counter))

    def advance(self, now: float) -> None:
        while self.coming and self.coming[0][0] <= now:
            self.counters[heapq.heappop(self.coming)[1]] += 1

    def reached(self, tile: dict[str, int]) -> bool:
        return tile["wait_target"] <= 0 or self.counters[tile["wait"]] >= tile["wait_target"]


IDLE, BEGINS, WAITS, STREAMS, ENDS, LEFT = range(6)


def play(schedule, device: Device, seed: int = 0) -> Played:
    """A launch without products through the iteration."""
    rng, n = random.Random(seed), device.programs
    tiles = records(schedule.tiles, _tables.TILE_FIELDS)
    weights, sums = Weights(schedule), Sums(schedule, device, rng)
    state, until, left = np.full(n, IDLE), np.zeros(n), np.zeros(n)
    from_hbm, into_l2 = np.zeros(n), np.zeros(n)  # of each byte that a program streams
    mine: list[dict[str, int]] = [{}] * n
    now, drawn, waited, came_in, hbm = 0.0, 0, 0, 0.0, 0.0
    read, found = Counter(), Counter()

    def which(what: int, over: bool = False) -> list[int]:
        return np.nonzero((state == what) & (until <= now) if over else state == what)[0].tolist()

    todo: list[list[tuple[np.ndarray, int]]] = [[]] * n  # parts that a program has still to read

    def go_on(p: int) -> None:
        """The next part of a tile: what of it is in L2, and what of it comes in."""
        name, arrays, stays = KINDS[mine[p]["kind"]]
        blocks, nbytes = todo[p].pop()
        hits = float((came_in - blocks < device.l2).mean())
        if stays:
            blocks[...] = came_in
        read[name] += nbytes
        found[name] += nbytes * hits
        left[p], from_hbm[p] = arrays * nbytes, 1 - hits / arrays
        first = (1 - hits) * (1 if stays else EVICTED_FIRST)
        into_l2[p] = (first + (arrays - 1) * EVICTED_FIRST) / arrays

    while True:
        sums.advance(now)
        for p in which(ENDS, over=True):
            state[p] = IDLE
            if mine[p]["block"] >= 0:
                sums.arrive(mine[p]["block"], now)
        for p in which(IDLE):
            state[p] = LEFT
            if drawn < len(tiles):
                state[p], mine[p], until[p] = BEGINS, tiles[drawn], now + device.before * rng.uniform(0.8, 1.2)
                drawn += 1
        state[(state == BEGINS) & (until <= now)] = WAITS
        for p in which(WAITS):
            tile = mine[p]
            if not sums.reached(tile):
                waited += 1
            elif tile["kind"] in (_tables.VECTORS, _tables.COMBINE):
                state[p], until[p] = ENDS, now + device.after
            else:
                state[p], todo[p] = STREAMS, weights.parts(tile)[::-1]
                go_on(p)
        streaming = state == STREAMS
        if streaming.any():
            rate = min(device.each, device.l2_rate / streaming.sum())
            if from_hbm[streaming].sum() > 0:
                rate = min(rate, device.hbm / from_hbm[streaming].sum())
            left[streaming] -= rate * STEP_US
            came_in += into_l2[streaming].sum() * rate * STEP_US
            hbm += from_hbm[streaming].sum() * rate * STEP_US
            for p in np.nonzero(streaming & (left <= 0))[0].tolist():
                if todo[p]:
                    go_on(p)
                else:
                    state[p], until[p] = ENDS, now + device.after * rng.uniform(0.8, 1.2)
        if (state == LEFT).all():
            return Played(now, waited * STEP_US / (now * n), hbm, {name: found[name] / read[name] for name in read})
        now += STEP_US
