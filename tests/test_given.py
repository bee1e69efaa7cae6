"""What a problem's setup gives the program, and how objects of its classes cross."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.sandbox.inside.objects import MAX_OBJECTS, ObjectTable
from fractal.sandbox.inside.protocol import Decoder, Encoder, ProtocolError, Reference
from fractal.sandbox.inside.suite import prepare

NODE = "class Node:\n    def __init__(self, val=0, next=None):\n        self.val, self.next = val, next\n"


def lines(setup: str, reference: str = "def f(x): return x", test: str = "assert f(1) == 1", name: str = "f") -> Any:
    problem = {"setup": setup, "reference": reference, "tests": [test], "entry_point": name}
    return prepare({"kind": "asserts", **problem}).given


@pytest.mark.parametrize(
    "setup",
    [
        "expected = [1, 2]\n",
        "class Cases:\n    data = [(1, 2)]\n",
        "class Cases:\n    def answer(self):\n        return 42\n",
        "class Cases:\n    '''Answers.'''\n    answer = 'forty-two'\n",
        "class Cases:\n    def check(self, x):\n        assert x == 1\n",
        "class Cases:\n    def check(self):\n        return f(1) == 1\n",
        "import unittest\nclass Cases(unittest.TestCase):\n    pass\n",
        "def check(x):\n    return x == 7\n",
        "table = {1: 2}\ndef check(x):\n    return table[x]\n",
        "class Cases:\n    def __repr__(self):\n        return 'a text that is longer than twenty characters'\n",
    ],
)
def test_what_could_hold_the_expected_values_is_not_given(setup: str) -> None:
    test = "assert f(1) == expected or check(f(1)) or Cases() or table"
    assert [line for line in lines(setup, test=test).lines if "import" not in line] == []


def test_classes_without_data_are_given_with_what_they_read() -> None:
    found = lines(
        "from dataclasses import dataclass\nimport os\n@dataclass\nclass P:\n    x: int\n    y: 'int' = 0\n" + NODE
    )
    assert found.classes == ["P", "Node"]
    assert found.lines[0] == "from dataclasses import dataclass"
    assert not found.first


def test_what_the_reference_reads_is_given() -> None:
    found = lines("A = 5\ndef g(x):\n    return x + A\nB = 6\n", "def f(x): return g(x)", "assert f(1) == A + B")
    assert found.lines == ["A = 5", "def g(x):\n    return x + A"]


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("def f(x: Optional[Node]): return x", "f"),
        ("class A:\n    def g(self, x: Node): pass\ndef f(x): return x", "f"),
        ("def f(x=Node()): return x", "f"),
        ("class Solution:\n    def f(self, x): return x", "Solution"),
        ("", "f"),
    ],
)
def test_the_setup_comes_first_where_the_reference_needs_it(reference: str, name: str) -> None:
    assert lines("from typing import *\n" + NODE, reference, name=name).first


class Node:
    def __init__(self, val: Any = 0, next: Any = None) -> None:
        self.val, self.next = val, next

    def method(self) -> None: ...


class End:
    """One end of a channel, as far as values go."""

    def __init__(self, trusted: bool) -> None:
        self.objects = ObjectTable(trusted, lambda value: self.encoder.encode(value))
        self.encoder = Encoder(lambda value: self.objects.refer(value) or {"x": [0, "object", True]})
        self.objects.give(["Node"], globals().get)
        self.decoder = Decoder(self.resolve)

    def resolve(self, reference: Reference) -> Any:
        if "states" in reference.data:
            return self.objects.set_states(reference.data["states"])
        return self.objects.resolve(reference) if "object" in reference.data else reference

    def send(self, value: Any) -> bytes:
        return json.dumps(self.objects.envelope(self.encoder.encode(value))).encode()

    def receive(self, body: bytes) -> Any:
        return self.objects.open(self.decoder.decode(body))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=10), st.lists(st.integers(0, 9), max_size=4))
def test_any_graph_crosses_and_comes_back_as_the_same_objects(edges: list[tuple[int, int]], roots: list[int]) -> None:
    judge, candidate = End(True), End(False)
    nodes = [Node(i) for i in range(10)]
    for a, b in edges:
        nodes[a].next = {"to": [nodes[b]]}
    here = [nodes[root] for root in roots]
    there = candidate.receive(judge.send(here))
    assert [n.val for n in there] == roots
    assert all((a is b) == (c is d) for a, c in zip(here, there, strict=True) for b, d in zip(here, there, strict=True))
    for node in there:
        node.seen = Node("new", node)
    back = judge.receive(candidate.send(there))
    assert all(a is b and a.seen.next is a and a.seen.val == "new" for a, b in zip(back, here, strict=True))


@pytest.mark.parametrize(
    "body",
    [
        {"v": [1, "Other"]},
        {"v": [0, "Node"]},
        {"v": [-1, "Node"]},
        {"v": [(1 << 32) | 1, "Node"]},
        {"v": ["1", "Node"]},
        {"v": [1, ["Node"]]},
        {"vs": [[1, "Node", [["method", 1]]]]},
        {"vs": [[1, "Node", [["__init__", 1]]]]},
        {"vs": [[1, "Node", [[1, 1]]]]},
        {"vs": [[1, "Node", ["ab"]]]},
        {"vs": [[1, "Node", {"d": []}]]},
        {"vs": [[2 * n + 1, "Node", []] for n in range(MAX_OBJECTS + 1)]},
    ],
)
def test_objects_that_no_honest_end_sends_are_protocol_errors(body: Any) -> None:
    with pytest.raises(ProtocolError):
        End(True).receive(json.dumps(body).encode())


@pytest.mark.parametrize(
    "text",
    [
        "np.arange(6).reshape(2, 3)",
        "np.array([1.5, np.nan, np.inf])",
        "np.array([[True], [False]])",
        "np.array(['a', 'bcd'])",
        "np.array([b'a', b'bcd'])",
        "np.array([1 + 2j], dtype='>c8')",
        "np.array(['2024-01-01'], dtype='M8[D]')",
        "np.array(5)",
        "np.zeros((0, 3))",
        "np.float64(1.5)",
        "np.int32(-3)",
        "np.bool_(True)",
        "np.array([None, 'a', [1]], dtype=object)",
    ],
)
def test_arrays_cross_by_value(text: str) -> None:
    import numpy as np

    value = eval(text)
    judge, candidate = End(True), End(False)
    (there,) = judge.receive(candidate.send([value]))
    assert type(there) is type(value)
    np.testing.assert_array_equal(there, value)
    assert there.dtype == value.dtype
    assert there.shape == value.shape


@pytest.mark.parametrize("text", ["np.zeros(2, dtype='i4,f8')", "np.matrix([1])"])
def test_arrays_of_their_own_kinds_stay(text: str) -> None:
    import numpy as np

    assert np
    assert End(False).encoder.encode(eval(text)) == {"x": [0, "object", True]}


@pytest.mark.parametrize(
    "body",
    [
        {"na": ["|O8", [1], "AAAAAAAAAAA="]},
        {"na": ["<i4", [3], "AAAA"]},
        {"na": ["<i4", [1 << 40], "AAAAAA=="]},
        {"na": ["<i4", [-1], "AAAAAA=="]},
        {"na": ["<i4,<f8", -1, "AAAAAA=="]},
        {"na": ["<U99999999999", [0], ""]},
        {"no": [[2], [1]]},
    ],
)
def test_arrays_that_no_honest_end_sends_are_protocol_errors(body: Any) -> None:
    with pytest.raises(ProtocolError):
        End(True).receive(json.dumps(body).encode())
