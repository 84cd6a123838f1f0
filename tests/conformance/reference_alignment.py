"""Second reader of aligned channels in format v1, written from docs/format.md alone.

It has permuted channels, turned and mirrored inputs, permuted, negated and mixed input channels, and signs of
rows. It has neither added channels nor the blocks of grouped convolutions.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.conformance.reference_recurrent import assignment, evaluate_readings, sketch_matrix, unit
from tests.conformance.reference_spread import Tensors, parse_safetensors, signed_kernel

Array = npt.NDArray[np.float64]
Order = npt.NDArray[np.int64]
Structure = dict[str, Any]
#: Transposed or not, then mirrored along rows and columns or not.
SQUARES = list(itertools.product((False, True), repeat=3))
STARTS, ROUNDS = 4, 12


def rounded(values: Array) -> Array:
    """Return multiples of 2⁻²⁰, in units of it."""
    return np.rint(values * 2**20)


class Layer:
    """Layer of W0 and the suspect's kernel of it, [rows, input columns, positions].

    Args:
        part: its part of the structure.
        reference: tensors of the reference.
        kernel: the suspect's kernel.
    """

    def __init__(self, part: Structure, reference: Tensors, kernel: Array) -> None:
        self.name, self.window, self.groups = part["module"], tuple(part["window"]), part["groups"]
        self.reads_inputs, self.free_signs = part["reads_inputs"], part["batch_norm"] is not None
        positions = math.prod(self.window)
        self.kernel = kernel.reshape(len(kernel), -1, positions).astype(np.float64)
        self.sketch = reference[f"{self.name}/sketch"].astype(np.float64)
        self.targets = unit(self.sketch)
        columns = reference[f"{self.name}/columns"].reshape(-1)
        if self.groups == 1 and len(columns) != self.kernel.shape[1]:  # flattened positions
            columns = np.sqrt((columns.reshape(-1, positions) ** 2).mean(1))
        self.columns = columns
        fan_in, size = self.kernel[0].size, self.sketch.shape[1]
        self.matrix = sketch_matrix(fan_in, size)
        back = np.linalg.pinv(self.matrix).T if 2 * size >= fan_in else self.matrix
        self.estimate = (self.sketch @ back.T).reshape(self.kernel.shape)
        self.weight = size / 16
        self.row_scales, self.column_scales = self.equal_norms()

    def equal_norms(self) -> tuple[Array, Array]:
        """Return multipliers of rows and columns that give them equal norms."""
        masses = (self.kernel**2).sum(2)
        present = masses.sum(0) > 0
        target, columns = len(masses) / max(1, present.sum()), np.ones(masses.shape[1])
        for step in range(13):
            sums = masses @ columns
            rows = 1 / np.where(sums > 0, sums, 1)
            if step < 12:
                sums = rows @ masses
                columns = np.where(present, target / np.where(sums > 0, sums, 1), 1)
        return np.sqrt(rows), np.sqrt(columns)

    def turned(self, square: tuple[bool, bool, bool]) -> Order:
        """Return the position in the suspect's kernel for each position of W0's."""
        grid = np.arange(math.prod(self.window)).reshape(self.window)
        transposed, rows, columns = square
        grid = grid.T if transposed else grid
        grid = grid[::-1] if rows else grid
        return (grid[:, ::-1] if columns else grid).reshape(-1)


class Alignment:
    """One start of the search.

    Args:
        layers: all layers, in execution order.
        structure: layers and channel sets.
        square: symmetry of the square.
        mix: matrix of the input channels.
        orders: known orders of sets, by number.
        own: whether the suspect's own order is preferred.
    """

    def __init__(
        self, layers: list[Layer], structure: Structure, square: tuple[bool, bool, bool], mix: Array,
        orders: dict[int, Order], own: bool = False,
    ) -> None:  # fmt: skip
        self.layers, self.sets, self.square, self.mix = layers, structure["sets"], square, mix
        self.orders, self.own, self.total = dict(orders), own, 0.0
        self.signs: dict[str, Array] = {}

    def order(self, layer: Layer, side: str) -> Order | None:
        """Return the suspect's row or column in the place of each of W0's; None if it is unknown."""
        count = len(layer.kernel) if side == "rows" else layer.kernel.shape[1]
        order = np.arange(count)
        for number, members in enumerate(self.sets):
            if layer.name in members[side]:
                if number not in self.orders:
                    return None
                places = np.array(members[side][layer.name])
                order[places] = places[self.orders[number]]
        return order

    def with_columns(self, layer: Layer) -> Array | None:
        """Return the suspect's rows with columns, positions and inputs in W0's order, and W0's norms."""
        order = np.arange(layer.kernel.shape[1]) if layer.groups > 1 else self.order(layer, "columns")
        if order is None:
            return None
        kernel = layer.kernel[:, :, layer.turned(self.square)]
        if layer.reads_inputs:
            return np.einsum("oci,cd->odi", kernel, self.mix)
        if layer.groups > 1:
            return kernel
        return (kernel * layer.column_scales[None, :, None])[:, order] * layer.columns[None, :, None]

    def projected(self, layer: Layer) -> Array | None:
        """Return the sketches of all of the suspect's rows, of unit length."""
        rows = self.with_columns(layer)
        return None if rows is None else unit(rows.reshape(len(rows), -1) @ layer.matrix)

    def row_similarity(self, layer: Layer, places: Order) -> Array | None:
        """Return the similarities of W0's rows and the suspect's at these places."""
        rows = self.projected(layer)
        if rows is None:
            return None
        cosines = layer.targets[places] @ rows[places].T * layer.weight
        return np.abs(cosines) if layer.free_signs else cosines

    def column_similarity(self, layer: Layer, places: Order) -> Array | None:
        """Return the similarities of W0's columns and the suspect's at these places."""
        order = self.order(layer, "rows")
        if order is None or layer.name not in self.signs:
            return None
        scaled = layer.kernel * layer.row_scales[:, None, None] * layer.column_scales[None, :, None]
        rows = scaled[order][:, :, layer.turned(self.square)] * self.signs[layer.name][:, None, None]
        return np.einsum("oip,ojp->ij", layer.estimate[:, places], rows[:, places]) * layer.weight

    def cosines(self, layer: Layer) -> Array | None:
        """Return the cosine of each of W0's rows and the suspect's row in its place."""
        rows, order = self.projected(layer), self.order(layer, "rows")
        return None if rows is None or order is None else (layer.targets * rows[order]).sum(1)

    def find_signs(self, layer: Layer) -> None:
        """Give each row the sign of its cosine where a batch norm follows."""
        cosines = self.cosines(layer)
        if cosines is not None:
            free = layer.free_signs & (rounded(cosines) < 0)
            self.signs[layer.name] = np.where(free, -1.0, 1.0)

    def run(self) -> None:
        """Assign one set after the other until nothing moves."""
        for layer in self.layers:
            self.find_signs(layer)
        for _ in range(ROUNDS):
            before = {number: order.copy() for number, order in self.orders.items()}
            self.total = sum(self.assign(number) for number in range(len(self.sets)))
            for layer in self.layers:
                if layer.name not in self.signs:
                    self.find_signs(layer)
            mixed = self.fit_mix()
            same = before.keys() == self.orders.keys()
            if same and not mixed and all(np.array_equal(before[n], o) for n, o in self.orders.items()):
                break

    def assign(self, number: int) -> float:
        """Assign the channels of one set and return their similarity."""
        members, parts, bonus = self.sets[number], [], 0.0
        writers = [layer for layer in self.layers if layer.name in members["rows"]]
        for layer in writers:
            bonus += 0.25 * layer.weight
            parts.append(self.row_similarity(layer, np.array(members["rows"][layer.name])))
        for layer in self.layers:
            if layer.name in members["columns"]:
                parts.append(self.column_similarity(layer, np.array(members["columns"][layer.name])))
        comparable = [part for part in parts if part is not None]
        if not comparable:
            return 0.0
        similarity = np.sum(comparable, 0) + (bonus * np.eye(members["size"]) if self.own else 0.0)
        self.orders[number] = assignment(-rounded(similarity))
        for layer in writers:
            self.find_signs(layer)
        return float(similarity[np.arange(members["size"]), self.orders[number]].sum())

    def fit_mix(self) -> bool:
        """Fit the mix of several input channels; return whether it changed."""
        for layer in self.layers:
            if layer.reads_inputs and layer.kernel.shape[1] > 1 and layer.name in self.signs:
                channels = layer.kernel.shape[1]
                matrix = layer.matrix.reshape(channels, -1, layer.matrix.shape[1])
                parts = np.einsum("oci,dis->ocds", self.aligned(layer), matrix)
                mix = np.eye(channels)
                before, scales = misfit(parts, mix, layer.sketch)
                for _ in range(20):
                    design = (scales[:, None, None, None] * parts).transpose(0, 3, 1, 2)
                    solution = np.linalg.lstsq(
                        design.reshape(-1, channels**2), layer.sketch.reshape(-1), rcond=None
                    )[0]
                    mix = solution.reshape(channels, channels)
                    if not np.linalg.norm(mix) > 0:
                        return False
                    mix = mix * math.sqrt(channels) / np.linalg.norm(mix)
                    after, scales = misfit(parts, mix, layer.sketch)
                free = max(1, layer.sketch.size - len(layer.sketch))
                if not after < before * (1 - 8 * (channels**2 - 1) / free):
                    return False
                self.mix = self.mix @ mix
                self.find_signs(layer)
                return True
        return False

    def aligned(self, layer: Layer) -> Array:
        """Return the kernel with W0's order and signs, [rows, input columns, positions]."""
        rows, columns = self.order(layer, "rows"), self.order(layer, "columns")
        kernel = layer.kernel if rows is None else layer.kernel[rows]
        if layer.groups == 1 and columns is not None:
            kernel = kernel[:, columns]
        kernel = kernel[:, :, layer.turned(self.square)]
        if layer.reads_inputs:
            kernel = np.einsum("oci,cd->odi", kernel, self.mix)
        return kernel * self.signs.get(layer.name, np.ones(len(kernel)))[:, None, None]

    def similarity(self, layers: list[Layer]) -> float:
        """Return the mean cosine of the rows over layers that are not zero."""
        means = []
        for layer in layers:
            cosines = self.cosines(layer)
            if layer.kernel.any() and cosines is not None:
                means.append((np.abs(cosines) if layer.free_signs else cosines).mean())
        return float(np.mean(means)) if means else 0.0


def misfit(parts: Array, mix: Array, sketch: Array) -> tuple[float, Array]:
    """Return the squared difference from the sketch under the best scale of each row, and the scales."""
    rows = np.einsum("ocds,cd->os", parts, mix)
    squares = (rows**2).sum(1)
    scales = (rows * sketch).sum(1) / np.where(squares > 0, squares, 1)
    return float(((scales[:, None] * rows - sketch) ** 2).sum()), scales


def input_mixes(channels: int, free_signs: bool) -> list[Array]:
    """Return the permutations of input channels with signs; a common sign changes only signs of rows."""
    if channels > 4:
        return [np.eye(channels)]
    signs = itertools.product((1.0, -1.0), repeat=channels)
    chosen = [np.array(sign) for sign in signs if not free_signs or sign[0] > 0]
    orders = itertools.permutations(range(channels))
    return [np.eye(channels)[list(order)] * sign[:, None] for order in orders for sign in chosen]


def starts(layers: list[Layer], structure: Structure) -> list[Alignment]:
    """Return the suspect's own order, and the four best orders of the rows that read the inputs."""
    squares = [s for s in SQUARES if not s[0] or all(h == w for h, w in (layer.window for layer in layers))]
    first = next(layer for layer in layers if layer.reads_inputs)
    mixes = input_mixes(first.kernel.shape[1], first.free_signs)
    number, places = next(
        (n, np.array(members["rows"][first.name]))
        for n, members in enumerate(structure["sets"])
        if first.name in members["rows"]
    )
    candidates = []
    for square, mix in itertools.product(squares, mixes):
        candidate = Alignment(layers, structure, square, mix, {})
        similarity = candidate.row_similarity(first, places)
        assert similarity is not None
        order = assignment(-rounded(similarity))
        candidate.orders[number] = order
        candidate.total = float(rounded(similarity[np.arange(len(order)), order].sum()))
        candidates.append(candidate)
    identity = {n: np.arange(members["size"]) for n, members in enumerate(structure["sets"])}
    inner = [x for x in layers if not x.reads_inputs and math.prod(x.window) > 1][:4] or [first]

    def own(square: tuple[bool, bool, bool], mix: Array) -> Alignment:
        return Alignment(layers, structure, square, mix, identity, own=True)

    square = max(squares, key=lambda s: rounded(np.array(own(s, np.eye(len(mixes[0]))).similarity(inner))))
    mix = max(mixes, key=lambda m: rounded(np.array(own(square, m).similarity([first]))))
    return [own(square, mix), *sorted(candidates, key=lambda candidate: -candidate.total)[:STARTS]]


def aligned(layers: list[Layer], structure: Structure) -> Alignment:
    """Return the alignment with the largest total similarity."""
    candidates = starts(layers, structure)
    for candidate in candidates:
        candidate.run()
    return max(candidates, key=lambda candidate: float(rounded(np.array(candidate.total))))


def evaluate_suspect(
    opening: dict[str, str], reference_bytes: bytes, suspect: bytes, structure: Structure
) -> dict[str, Any]:
    """Return scores, matching bits and evidence of the better of the own and the aligned reading.

    Args:
        opening: the key opening.
        reference_bytes: W0's reference, with a basis for each layer.
        suspect: a safetensors file with all kernels.
        structure: layers in execution order, and channel sets.
    """
    reference, tensors = parse_safetensors(reference_bytes), parse_safetensors(suspect)
    own, layers = {}, []
    for part in structure["layers"]:
        kernel = signed_kernel(tensors, (part["module"], part["groups"], part["batch_norm"]), reference)
        assert kernel is not None
        own[part["module"]] = kernel
        layers.append(Layer(part, reference, tensors[f"{part['module']}.weight"].astype(np.float32)))
    best = aligned(layers, structure)
    result = {
        layer.name: best.aligned(layer).astype(np.float32).astype(np.float64).reshape(own[layer.name].shape)
        for layer in layers
    }
    same = all(np.array_equal(own[name], result[name]) for name in own)
    readings = [own] if same else [own, result]
    keys = {layer.name: layer.name for layer in layers}
    return evaluate_readings(opening, reference, readings, keys) | {"similarity": best.similarity(layers)}
