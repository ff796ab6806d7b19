"""A model of a launch in plain Python: programs in any order do the tiles of a schedule, and what they write, read,
wait for and raise is followed. It reads the tables that the kernels read, and knows no kernel.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from bssn_kernels.backends import _tables as s
from bssn_kernels.backends._geometry import FLAT, MOST_CHUNKS
from bssn_kernels.backends._schedule import Schedule


def records(table, names: Sequence[str]) -> list[dict[str, int]]:
    return [dict(zip(names, row)) for row in table.tolist()]


class Model:
    """The schedule's tables as dictionaries, and the state of one launch.

    Attributes:
        counters: by number; 0 is the ticket.
        owner: for each number of the workspace, who wrote it last: a block, or nobody (-1).
        covered: how often each number of a layer's result was written.
        vectors: how often each number of `saved` was written.
    """

    def __init__(self, schedule: Schedule, saved_numel: int) -> None:
        names = [*s.LAYER_FIELDS, *(f"{name}{e}" for e in range(2) for name in s.ROLE_FIELDS)]
        self.tiles = records(schedule.tiles, s.TILE_FIELDS)
        self.blocks = records(schedule.blocks, s.BLOCK_FIELDS)
        self.layers = records(schedule.layers, names)
        self.parts = records(schedule.vectors, s.VECTOR_FIELDS)
        self.counters = [0] * schedule.n_counters
        self.owner = np.full(max(schedule.workspace, 1), -1)
        self.covered = [np.zeros(layer["numel"], dtype=int) for layer in self.layers]
        self.vectors = np.zeros(saved_numel, dtype=int)
        self.finished: set[int] = set()  # layers whose norms, and what comes of them, are known
        self.whole: dict[int, int] = {}  # the block of the tiles of whole rows that were done last, by layer

    # -- what a tile does

    def may_run(self, tile: dict[str, int]) -> bool:
        return self.counters[tile["wait"]] >= tile["wait_target"] if tile["wait_target"] else True

    def columns(self, tile: dict[str, int]) -> np.ndarray:
        """Columns of a product or update tile, chunk by chunk."""
        begin = tile["col0"] + np.arange(tile["chunks"])[:, None] * tile["step"]
        columns = begin + np.arange(tile["width"])[None, :]
        return columns[columns < tile["end"]]

    def elements(self, tile: dict[str, int]) -> np.ndarray:
        """Numbers of the weight that a tile reads or writes."""
        layer = self.layers[tile["layer"]]
        if tile["kind"] in (s.SCALE, s.DOT):
            return tile["row0"] * FLAT + np.arange(tile["rows"])
        rows = tile["row0"] + np.arange(tile["rows"])
        return (rows[:, None] * layer["l"] + self.columns(tile)[None, :]).ravel()

    def partials(self, tile: dict[str, int], e: int) -> np.ndarray:
        """Places in the workspace where a product tile leaves the sums of role e."""
        layer = self.layers[tile["layer"]]
        columns = self.columns(tile)
        if tile["kind"] in (s.OUTER, s.ROWS):
            return layer[f"outer_partial{e}"] + tile[f"slot{e}"] * layer["l"] + columns
        q, r = columns // layer["r"], columns % layer["r"]
        classes = np.unique(q * layer[f"raw_yq{e}"] + r * layer[f"raw_yr{e}"])
        rows = tile["row0"] + np.arange(tile["rows"])
        slot = layer[f"inner_partial{e}"] + tile[f"slot{e}"] * layer[f"slab_size{e}"]
        return (slot + rows[:, None] * layer[f"raw_yp{e}"] + classes[None, :]).ravel()

    def roles(self, mask: int) -> list[int]:
        return [e for e in range(2) if mask >> e & 1]

    def raw(self, layer: dict[str, int], name: str, e: int, odd: bool) -> np.ndarray:
        """Places of a whole raw vector."""
        at = layer[f"{name}_odd{e}" if odd else f"{name}{e}"]
        if name == "slab":
            return at + np.arange(layer[f"slab_size{e}"])
        return at + np.arange(-(-layer["l"] * 1 // (layer[f"fold{e}"])))

    def run(self, number: int) -> None:
        """Do a tile and count it."""
        tile = self.tiles[number]
        if tile["kind"] in (s.SCALE, s.UPDATE, s.VECTORS):
            assert tile["layer"] in self.finished, "a layer was scaled before its norms were known"
        if tile["kind"] in (s.INNER, s.OUTER):
            self.check_source(tile)
            assert tile["kind"] == s.OUTER or tile["chunks"] <= MOST_CHUNKS, "csrc/cuda has no room for more vectors"
            for e in self.roles(tile["mask"]):
                self.owner[self.partials(tile, e)] = tile["block"]
        elif tile["kind"] == s.ROWS:
            self.run_rows(tile)
        elif tile["kind"] in (s.SCALE, s.UPDATE):
            np.add.at(self.covered[tile["layer"]], self.elements(tile), 1)
        elif tile["kind"] == s.VECTORS:
            for part in self.parts[tile["row0"] : tile["row0"] + tile["rows"]]:
                e = part["begin"] + np.arange(part["count"])
                at = e // part["divisor"] * part["high"] + e % part["divisor"] * part["low"]
                np.add.at(self.vectors, part["saved"] + at, 1)
                if not part["copy"]:
                    makers = {int(block) for block in np.unique(self.owner[part["raw"] + e])}
                    assert -1 not in makers and {self.blocks[block]["layer"] for block in makers} == {tile["layer"]}
                    assert all(self.blocks[block]["final"] != part["start"] for block in makers)
        if tile["kind"] in (s.INNER, s.OUTER, s.DOT, s.ROWS, s.COMBINE):
            self.arrive(tile["block"])

    def run_rows(self, tile: dict[str, int]) -> None:
        """Whole rows: their part of the slab is complete, their part of the spread is left for who adds up."""
        layer, number = self.layers[tile["layer"]], tile["block"]
        block = self.blocks[number]
        assert (tile["mask"], block["mask"]) == (1, 0) and len(self.columns(tile)) == layer["l"]
        assert tile["slot0"] < min(layer["inner_share_count0"], layer["outer_slots0"])
        self.check_source(tile)
        self.owner[self.partials(tile, 0)] = number
        slab = self.raw(layer, "slab", 0, bool(block["parity"]))
        self.owner[slab[tile["row0"] : tile["row0"] + tile["rows"]]] = number
        self.whole[tile["layer"]] = number

    def check_source(self, tile: dict[str, int]) -> None:
        """What a product reads was completed, and by the pass that it is meant to follow."""
        if not s.RAW <= tile["source"] < s.SAVED:
            return
        layer, odd = self.layers[tile["layer"]], bool((tile["source"] - s.RAW) % 2)
        for e in self.roles(tile["mask"]):
            if tile["kind"] in (s.INNER, s.ROWS):
                columns = self.columns(tile)
                q, r = columns // layer["r"], columns % layer["r"]
                at = q * layer[f"raw_xq{e}"] + r * layer[f"raw_xr{e}"]
                places = layer[f"spread_odd{e}" if odd else f"spread{e}"] + at
            else:
                rows, columns = tile["row0"] + np.arange(tile["rows"]), self.columns(tile)
                q, r = columns // layer["r"], columns % layer["r"]
                classes = np.unique(q * layer[f"raw_yq{e}"] + r * layer[f"raw_yr{e}"])
                at = rows[:, None] * layer[f"raw_yp{e}"] + classes[None, :]
                places = layer[f"slab_odd{e}" if odd else f"slab{e}"] + at.ravel()
            makers = {int(block) for block in np.unique(self.owner[places])}
            for block in makers:
                assert block >= 0, "a vector was read before it was written"
                made = self.blocks[block]
                assert made["layer"] == tile["layer"] and made["parity"] == odd and made["mask"] >> e & 1
                assert made["kind"] != tile["kind"]

    def arrive(self, number: int) -> None:
        block = self.blocks[number]
        self.counters[block["counter"]] += 1
        if self.counters[block["counter"]] < block["arrivals"]:
            return
        assert self.counters[block["counter"]] == block["arrivals"]
        if block["kind"] != s.DOT:
            for e in self.roles(block["mask"]):
                self.combine(number, block, e)
        self.counters[block["then"]] += 1
        if block["then_target"] and self.counters[block["then"]] == block["then_target"]:
            self.counters[block["done"]] += 1
            if block["final"]:
                self.finished.add(block["layer"])
            if block["batch"] >= 0:
                self.counters[block["batch"]] += 1

    def combine(self, number: int, block: dict[str, int], e: int) -> None:
        """All partial sums that are added were left by tiles of this block; the result's place is taken."""
        layer, makers = self.layers[block["layer"]], self.whole.get(block["layer"], number)
        assert makers == number or self.blocks[makers]["parity"] == block["parity"]
        for out, places in self.sums(block, layer, e):
            assert (self.owner[places] == makers).all(), "partial sums of another block, or of nobody"
            self.owner[out] = number

    def sums(self, block: dict[str, int], layer: dict[str, int], e: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        odd = bool(block["parity"])
        if block["kind"] == s.INNER:
            classes = layer[f"raw_yp{e}"]
            n = np.arange(block["start0"] * classes, (block["start0"] + block["count0"]) * classes)
            slots = np.arange(layer[f"inner_slots{e}"]) * layer[f"slab_size{e}"]
            raw = layer[f"slab_odd{e}" if odd else f"slab{e}"]
            yield raw + n, layer[f"inner_partial{e}"] + slots[:, None] + n[None, :]
            return
        start, n, segments = block["start0"], block["count0"], block["segments"]
        if e == 1:
            start, n, segments = block["start1"], block["count1"], 1
        folds = np.arange(layer[f"fold{e}"]) * layer[f"fold_stride{e}"]
        slots = np.arange(layer[f"outer_slots{e}"]) * layer["l"]
        raw = layer[f"spread_odd{e}" if odd else f"spread{e}"]
        for i in range(segments):
            entries = start + np.arange(n)
            at = entries * layer[f"entry_stride{e}"] + i * layer["r"]
            places = slots[:, None, None] + folds[None, :, None] + at[None, None, :]
            yield raw + entries + i * layer["r"], layer[f"outer_partial{e}"] + places.ravel()

    def doubles(self) -> list[tuple[int, int]]:
        """Places of norm shares, results and dot products: first number and how many."""
        found = []
        for k, layer in enumerate(self.layers):
            if layer["dot_count"]:
                found.append((layer["dots"], 1 + layer["dot_count"]))
                continue
            for e in range(2):
                if layer[f"exists{e}"]:
                    found += [(layer[f"{n}_shares{e}"], layer[f"{n}_share_count{e}"]) for n in ("inner", "outer")]
                    found.append((layer[f"results{e}"], 2 * len(s.RESULTS)))
            used = {block["share"] for block in self.blocks if block["layer"] == k and block["kind"] == s.INNER}
            assert not used or max(used) < layer["inner_share_count0" if layer["exists0"] else "inner_share_count1"]
        return found

    # -- a launch

    def in_order(self) -> None:
        """One program does every tile: whatever it waits for must have come from smaller tickets."""
        for number, tile in enumerate(self.tiles):
            assert self.may_run(tile), f"tile {number} waits for a later one: {tile}"
            self.run(number)

    def at_random(self, programs: int, resident: int, rng: random.Random) -> None:
        """A grid of programs of which some are resident; any of those may make the next move."""
        ticket, started, last = 0, 0, len(self.tiles) + programs - 1
        running: list[int | None] = []  # the tile that a resident program holds
        cleared = 0
        while started < programs or running:
            while started < programs and len(running) < resident:
                running.append(None)
                started += 1
            ready = [i for i, held in enumerate(running) if held is None or self.may_run(self.tiles[held])]
            assert ready, "no program can go on"
            i = rng.choice(ready)
            if running[i] is not None:
                self.run(running[i])
                running[i] = None
                continue
            ticket, drawn = ticket + 1, ticket
            if drawn < len(self.tiles):
                running[i] = drawn
                continue
            if drawn == last:
                assert all(held is None for held in running), "a program is in a tile while the counters are cleared"
                cleared += 1
            del running[i]
        assert cleared == 1 and ticket == last + 1

    def check_results(self, vectors: int) -> None:
        """Every number was written exactly once."""
        for written in self.covered:
            assert (written == 1).all()
        assert (self.vectors[:vectors] == 1).all()


def products(model: Model) -> Counter:
    """How often each weight takes part in an inner and an outer product, by layer, kind, source and role: the smallest
    and the largest count of each."""
    counts: dict[tuple, np.ndarray] = {}
    for tile in model.tiles:
        kinds = {s.INNER: (s.INNER,), s.OUTER: (s.OUTER,), s.ROWS: (s.INNER, s.OUTER)}.get(tile["kind"], ())
        for kind in kinds:
            for e in model.roles(tile["mask"]):
                key = tile["layer"], kind, tile["source"], e
                array = counts.setdefault(key, np.zeros(model.layers[tile["layer"]]["numel"], dtype=int))
                np.add.at(array, model.elements(tile), 1)
    return {key: (array.min(), array.max()) for key, array in counts.items()}
