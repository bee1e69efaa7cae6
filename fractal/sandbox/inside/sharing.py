"""Which programs may share a process: those whose byte code can reach nothing but values that they made themselves.

Most programs for such problems are a function of numbers, strings and lists. A fresh process for one of those costs ten
times what running it costs. `reason_against` reads a program's byte code and allows only what is listed here:
operations without classes, attribute assignment or pattern matching; built-in functions that neither reflect nor touch
files; the attributes that are methods of plain values or functions of a few modules. Names with two underscores are
out. What is left cannot change a module, a class, a built-in, a setting of the interpreter or the process, so the next
program finds everything as it was. A program with anything else, honest or not, gets a process of its own
(docs/sandbox.md).

The lists are closed and the check fails closed: an unknown operation, name or interpreter version is a reason. It is
run by the very process that would be shared, which by the same rule has run nothing that could have changed the check.
"""

import builtins
import cmath
import itertools
import math
import opcode
import operator
import sys
import types

VERSION = (3, 11)  # of the byte code below
OPERATIONS = frozenset(
    "CACHE POP_TOP PUSH_NULL NOP UNARY_POSITIVE UNARY_NEGATIVE UNARY_NOT UNARY_INVERT BINARY_SUBSCR STORE_SUBSCR "
    "DELETE_SUBSCR GET_ITER GET_YIELD_FROM_ITER LOAD_ASSERTION_ERROR RETURN_GENERATOR LIST_TO_TUPLE RETURN_VALUE "
    "YIELD_VALUE POP_EXCEPT PUSH_EXC_INFO CHECK_EXC_MATCH RERAISE STORE_NAME DELETE_NAME UNPACK_SEQUENCE FOR_ITER "
    "UNPACK_EX STORE_GLOBAL DELETE_GLOBAL SWAP LOAD_CONST LOAD_NAME BUILD_TUPLE BUILD_LIST BUILD_SET BUILD_MAP "
    "LOAD_ATTR COMPARE_OP IMPORT_NAME IMPORT_FROM JUMP_FORWARD JUMP_IF_FALSE_OR_POP JUMP_IF_TRUE_OR_POP "
    "POP_JUMP_FORWARD_IF_FALSE POP_JUMP_FORWARD_IF_TRUE LOAD_GLOBAL IS_OP CONTAINS_OP COPY BINARY_OP SEND LOAD_FAST "
    "STORE_FAST DELETE_FAST POP_JUMP_FORWARD_IF_NOT_NONE POP_JUMP_FORWARD_IF_NONE RAISE_VARARGS MAKE_FUNCTION "
    "BUILD_SLICE JUMP_BACKWARD_NO_INTERRUPT MAKE_CELL LOAD_CLOSURE LOAD_DEREF STORE_DEREF DELETE_DEREF JUMP_BACKWARD "
    "CALL_FUNCTION_EX EXTENDED_ARG LIST_APPEND SET_ADD MAP_ADD COPY_FREE_VARS RESUME FORMAT_VALUE BUILD_CONST_KEY_MAP "
    "BUILD_STRING LOAD_METHOD LIST_EXTEND SET_UPDATE DICT_MERGE DICT_UPDATE PRECALL CALL KW_NAMES "
    "POP_JUMP_BACKWARD_IF_NOT_NONE POP_JUMP_BACKWARD_IF_NONE POP_JUMP_BACKWARD_IF_FALSE POP_JUMP_BACKWARD_IF_TRUE".split()  # noqa: E501
)
BUILTINS = frozenset(
    "abs all any ascii bin bool callable chr complex dict divmod enumerate filter float format frozenset hash hex "
    "input int isinstance issubclass iter len list map max min next object oct ord pow print range repr reversed round "
    "set slice sorted str sum tuple zip "
    "ArithmeticError AssertionError AttributeError EOFError Exception IndexError KeyError LookupError NameError "
    "NotImplementedError OverflowError RuntimeError StopIteration TypeError ValueError ZeroDivisionError".split()
)
MODULES = frozenset(
    "bisect cmath collections copy functools heapq itertools math operator re string sys typing".split()
)
# Attributes by name, whatever they are read from: those of plain values, then those of the modules above. Not here:
# format, format_map and attrgetter (they walk attributes by their names), update_wrapper and wraps (they set them),
# tee, groupby, OrderedDict and bytearray (their histories hold memory errors).
METHODS = frozenset(
    "append extend insert pop remove clear index count sort reverse copy get items keys values setdefault update "
    "fromkeys popitem add discard union intersection difference symmetric_difference issubset issuperset isdisjoint "
    "intersection_update difference_update symmetric_difference_update most_common elements subtract total appendleft "
    "popleft extendleft rotate "
    "capitalize casefold center endswith expandtabs find isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isprintable isspace istitle isupper join ljust lower lstrip maketrans partition removeprefix removesuffix replace "
    "rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title translate upper "
    "zfill "
    "bit_length bit_count is_integer as_integer_ratio conjugate real imag numerator denominator args "
    "group groups groupdict start end span".split()
)
FUNCTIONS = frozenset(
    [
        *"match fullmatch search findall finditer sub subn compile escape".split(),
        *"IGNORECASE I MULTILINE M DOTALL S ASCII A".split(),
        *"bisect bisect_left bisect_right insort insort_left insort_right".split(),
        *"heappush heappop heapify heapreplace heappushpop nlargest nsmallest merge".split(),
        *"reduce lru_cache cache cmp_to_key partial deepcopy Counter defaultdict deque maxsize getsizeof".split(),
        *"ascii_letters ascii_lowercase ascii_uppercase digits hexdigits octdigits punctuation whitespace".split(),
        *"List Dict Tuple Set Optional Union Any Callable Iterable Iterator Sequence Generator".split(),
        *(name for module in (math, cmath) for name in vars(module) if name[0] != "_"),
        *(name for name in vars(itertools) if name[0] != "_" and name not in ("tee", "groupby")),
        *(name for name in operator.__all__ if name not in ("attrgetter", "methodcaller", "call")),
    ]
)
ATTRIBUTES = METHODS | FUNCTIONS
FORBIDDEN_GLOBALS = frozenset(vars(builtins)) - BUILTINS - {"__name__"}
ASYNC = 0x80 | 0x100 | 0x200  # inspect.CO_COROUTINE, CO_ITERABLE_COROUTINE, CO_ASYNC_GENERATOR
MAX_SOURCE = 1 << 16  # characters: larger ones are rare, and slow to compile

_ALLOWED = {number for name, number in opcode.opmap.items() if name in OPERATIONS}
_EXTENDED = opcode.opmap["EXTENDED_ARG"]
_ATTRIBUTE = {opcode.opmap[name] for name in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM") if name in opcode.opmap}
_MODULE = opcode.opmap["IMPORT_NAME"]
_NAMED = {opcode.opmap[name] for name in ("LOAD_NAME", "STORE_NAME", "DELETE_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")}
_GLOBAL = opcode.opmap["LOAD_GLOBAL"]


def unknown_interpreter() -> str:
    """Why no program at all may share a process under this interpreter; "" if its byte code is known."""
    if sys.version_info[:2] == VERSION and sys.implementation.name == "cpython":
        return ""
    here = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
    return f"the byte code of {here} is not known, only that of CPython {VERSION[0]}.{VERSION[1]}"


def reason_against(code: types.CodeType) -> str:
    """Why a program needs a process of its own; "" if it may share one. `code` is what compile() made of its text."""
    if unknown := unknown_interpreter():
        return unknown
    todo = [code]
    while todo:
        code = todo.pop()
        if code.co_flags & ASYNC:
            return "a coroutine"
        if reason := _reason_in(_without_docstring(code), code.co_names):
            return reason
        todo += [constant for constant in code.co_consts if type(constant) is types.CodeType]
    return ""


def _without_docstring(code: types.CodeType) -> bytes:
    """The byte code behind the text that a module begins with, which sets __doc__ in its own globals."""
    text = code.co_code
    if text[:5] == _DOCSTRING and code.co_names[text[5]] == "__doc__" and type(code.co_consts[0]) is str:
        return text[6:]
    return text


def _reason_in(text: bytes, names: tuple[str, ...]) -> str:
    """The first instruction that is not allowed. Two bytes each; EXTENDED_ARG brings an argument's high bits."""
    high = 0
    for operation, low in zip(text[::2], text[1::2], strict=True):
        if operation not in _ALLOWED:
            return opcode.opname[operation]
        if operation == _EXTENDED:
            high = (high | low) << 8
            continue
        argument, high = high | low, 0
        if operation in _ATTRIBUTE:
            if names[argument] not in ATTRIBUTES:
                return f"attribute {names[argument]}"
        elif operation == _GLOBAL:
            name = names[argument >> 1]  # the lowest bit says whether a call follows
            if (name in FORBIDDEN_GLOBALS or name[:2] == "__") and name != "__name__":
                return f"name {name}"
        elif operation in _NAMED:
            name = names[argument]
            if name in FORBIDDEN_GLOBALS or (name[:2] == "__" and (name != "__name__" or operation != _LOAD_NAME)):
                return f"name {name}"
        elif operation == _MODULE and names[argument] not in MODULES:
            return f"module {names[argument]}"
    return ""


_LOAD_NAME = opcode.opmap["LOAD_NAME"]
_DOCSTRING = bytes([opcode.opmap["RESUME"], 0, opcode.opmap["LOAD_CONST"], 0, opcode.opmap["STORE_NAME"]])
