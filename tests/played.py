"""A launch played on a model of a device that shares its memory's bandwidth and keeps what it read in an L2.

Every program draws a tile, takes some time to begin it, waits for what it must, streams its bytes and takes some time
to end it. All that stream share the bandwidths; what comes from HBM counts against the smaller one. L2 forgets what was
read longest ago, by bytes that came in since; of what is read or written first to be evicted a third counts. Times and
rates are those of an H200 (benchmarks/results/gpu_h200_tuning.jsonl), whose measured times the model gives back:
test_played.py.
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
ROWS, COLUMNS = 8, 128  # of a weight, of which L2 remembers when they were read last
EVICTED_FIRST = 0.3
# By kind of tile: its name, how many arrays it reads and writes, whether the first of them is to stay in L2, for those
# who read it after. All others are first to be evicted.
KINDS = {
    _tables.INNER: ("inner", 1, True),
    _tables.OUTER: ("outer", 1, True),
    _tables.SCALE: ("scale", 2, False),
    _tables.DOT: ("dot", 2, True),
    _tables.UPDATE: ("update", 2, False),
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
    hbm: float = 3.5e6
    l2_rate: float = 6e6
    each: float = 13e3
    l2: float = 45e6
    before: float = 2.5
    after: float = 2.5
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
        shapes = [(-(-g.P // ROWS), -(-g.L // COLUMNS)) for g in schedule.geometries]
        self.read = [np.full(shape, -np.inf) for shape in shapes]

    def of(self, tile: dict[str, int]) -> tuple[np.ndarray, int]:
        """The blocks of a tile, and its bytes."""
        geometry, read = self.geometries[tile["layer"]], self.read[tile["layer"]]
        if tile["kind"] in (_tables.SCALE, _tables.DOT):
            begin, n = tile["row0"] * FLAT, tile["rows"]
            (first, col), (last, end) = divmod(begin, geometry.L), divmod(begin + n - 1, geometry.L)
            columns = slice(col // COLUMNS, end // COLUMNS + 1) if first == last else slice(None)
            return read[first // ROWS : last // ROWS + 1, columns], n * self.itemsize
        wide = min((tile["chunks"] - 1) * tile["step"] + tile["width"], tile["end"] - tile["col0"])
        n = min(tile["chunks"] * tile["width"], tile["end"] - tile["col0"])
        rows = slice(tile["row0"] // ROWS, -(-(tile["row0"] + tile["rows"]) // ROWS))
        columns = slice(tile["col0"] // COLUMNS, -(-(tile["col0"] + wide) // COLUMNS))
        return read[rows, columns], tile["rows"] * n * self.itemsize


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
            elif tile["kind"] == _tables.VECTORS:
                state[p], until[p] = ENDS, now + device.after
            else:
                blocks, nbytes = weights.of(tile)
                hits = float((came_in - blocks < device.l2).mean())
                name, arrays, stays = KINDS[tile["kind"]]
                read[name] += nbytes
                found[name] += nbytes * hits
                state[p], left[p], from_hbm[p] = STREAMS, arrays * nbytes, 1 - hits / arrays
                first = (1 - hits) * (1 if stays else EVICTED_FIRST)
                into_l2[p] = (first + (arrays - 1) * EVICTED_FIRST) / arrays
        streaming = state == STREAMS
        if streaming.any():
            rate = min(device.each, device.l2_rate / streaming.sum())
            if from_hbm[streaming].sum() > 0:
                rate = min(rate, device.hbm / from_hbm[streaming].sum())
            left[streaming] -= rate * STEP_US
            came_in += into_l2[streaming].sum() * rate * STEP_US
            hbm += from_hbm[streaming].sum() * rate * STEP_US
            for p in np.nonzero(streaming & (left <= 0))[0].tolist():
                if KINDS[mine[p]["kind"]][2]:
                    weights.of(mine[p])[0][...] = came_in
                state[p], until[p] = ENDS, now + device.after * rng.uniform(0.8, 1.2)
        if (state == LEFT).all():
            return Played(now, waited * STEP_US / (now * n), hbm, {name: found[name] / read[name] for name in read})
        now += STEP_US
